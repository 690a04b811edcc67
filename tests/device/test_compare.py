"""`tpqwen compare`: three methods, the same greedy tokens, a table, JSON and a picture."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tpqwen.bench import compare
from tpqwen.bench.compare import Comparison
from tpqwen.bench.environment import environment
from tpqwen.config import Config
from tpqwen.offline import OfflineEngine
from tpqwen.request import SamplingParams
from tpqwen.worker.peak import take_peak


def test_compare_measures_checks_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    report, plot = tmp_path / "r.json", tmp_path / "r.png"
    args = parser.parse_args(
        f"--requests 6 --tokens 8 --naive-requests 2 --lengths 5,10 --json {report} --plot {plot}".split()
    )
    assert compare.run(args, Config.load({"device": "cpu"}, {})) == 0
    figures = json.loads(report.read_text())
    assert figures["greedy_tokens_agree"] is True
    assert [m["method"] for m in figures["methods"]] == ["naive", "cached", "batched"]
    assert all(m["seconds"] > 0 and m["peak_memory_mib"] > 0 for m in figures["methods"])
    assert [c["tokens"] for c in figures["by_length"]] == [5, 10]
    assert "commit" in figures["environment"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "batched" in capsys.readouterr().out


def test_on_a_host_with_a_gpu_a_run_on_its_cpu_is_measured_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert take_peak(torch.device("cpu")) > 0
    facts = environment("cpu")
    assert "cpu" in facts and "gpu" not in facts
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "cpu" in environment("auto"), "whether or not the host has one, this process cannot use it"


class Scripted(Comparison):
    """Knows how far apart any two tokens are: their difference in hundredths."""

    def __init__(self, dtype: str) -> None:
        self.engine = SimpleNamespace(capacity=SimpleNamespace(kv_dtype=dtype))  # type: ignore[assignment]
        self.asked: list[list[int]] = []

    def _gap(self, ids: list[int], one: int, other: int) -> float:
        self.asked.append(ids)
        return abs(one - other) / 100


@pytest.mark.parametrize(
    ("dtype", "token", "holds", "text"),
    [
        ("bfloat16", 7, True, "agree of all"),
        ("bfloat16", 9, True, "agree but for near ties: 1 of 3 sequences part, at tokens up to 0.020 apart"),
        ("bfloat16", 27, False, "DIFFER: 1 of 3 sequences part, at tokens up to 0.200 apart"),
        ("float32", 8, False, "DIFFER: 1 of 3 sequences part, at tokens up to 0.010 apart"),
    ],
)
def test_sequences_may_part_only_at_ties_of_16_bit_numbers(dtype: str, token: int, holds: bool, text: str) -> None:
    comparison = Scripted(dtype)
    batched = [[5, 6, 7, 8], [1, 2, 3, 4], [0, 0, 0, 0]]
    outputs = {"naive": [[5, 6, token, 8 if token == 7 else 99]], "cached": batched[:2], "batched": batched}
    agreement = comparison.agreement([[1, 2], [3], [4]], outputs)
    assert agreement.holds is holds
    assert str(agreement) == f"greedy tokens {text}".replace("agree of all", "of all methods agree")
    assert comparison.asked == ([] if token == 7 else [[1, 2, 5, 6]])


def test_the_gap_of_two_tokens_is_that_of_their_log_probabilities() -> None:
    engine = OfflineEngine(Config.load({"device": "cpu"}, {}))
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, logprobs=3)
    deltas = [d for step in engine.run([engine.request([5, 6, 7], params)]) for d in step]
    score = deltas[0].logprobs[0]  # type: ignore[index]
    assert score is not None
    comparison = Comparison(engine)
    gap = comparison._gap([5, 6, 7], score.top_ids[0], score.top_ids[2])
    assert gap == pytest.approx(score.top_logprobs[0] - score.top_logprobs[2], abs=1e-5)
    assert comparison._gap([5, 6, 7], score.top_ids[0], -1) == math.inf, "a token that is not among the likeliest"
    engine.close()
