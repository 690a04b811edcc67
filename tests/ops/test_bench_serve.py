"""`tpqwen bench serve` against a real server, and the arithmetic of its figures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.http.live import Live, live
from tpqwen import cli
from tpqwen.api.access import Access
from tpqwen.api.keys import Keyring
from tpqwen.bench.load import Case, Done, Job, Record, prompt
from tpqwen.bench.serve import clients_for, parse, percentiles, summary
from tpqwen.errors import ConfigError

KEY = "tpq_alice_0123456789abcdef"


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live(step_s=0.005, access=Access(Keyring.parse(f"alice {KEY}"))) as here:
        yield here


def bench(monkeypatch: pytest.MonkeyPatch, *words: str, key: str = KEY) -> int:
    monkeypatch.setattr(cli, "set_ray_defaults", lambda environ, words: None)
    monkeypatch.setattr(cli.logs, "configure", lambda level, process: None)
    monkeypatch.setenv("OPENAI_API_KEY", key)
    return cli.main(["bench", "serve", *words, "--token-ids", "100"])


def test_closed_and_open_loops_are_measured_saved_compared_and_drawn(
    server: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved, drawn = tmp_path / "first.json", tmp_path / "plot.png"
    before = len(server.hooks.named("finished"))
    cases = ["closed:2:2:3:2:warm", "closed:4:6:20:24", "open:200:6:8:20"]
    files = ["--save", str(saved), "--plot", str(drawn), "--clients", "2", "--cpu", "no such process"]
    assert bench(monkeypatch, server.url, *cases, *files) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [(r["case"], r["tokens"], r["errors"]) for r in lines] == [
        ("closed:4:6:20:24", 144, 0),
        ("open:200:6:8:20", 120, 0),
    ]
    for r in lines:
        assert 0 < r["ttft_p50"] <= r["ttft_p99"] <= r["e2e_p99"]
        assert r["tpot_p50"] > 0 and r["tok_s"] > 0 and r["goodput_share"] == 1
        assert r["cpu_us_per_token_no such process"] == 0
    sequences = [s for (s,) in server.hooks.named("finished")[before:]]
    assert sorted({(s.prompt_tokens, s.output_tokens) for s in sequences}) == [(3, 2), (8, 20), (20, 24)]
    result = json.loads(saved.read_text())
    assert result["environment"]["model"] == "qwen3-test" and len(result["results"]) == 2
    assert drawn.read_bytes()[:4] == b"\x89PNG"
    assert bench(monkeypatch, server.url + "/v1/", "closed:4:6:20:24", "--compare", str(saved)) == 0
    assert "%" in capsys.readouterr().out


def test_failed_requests_are_counted_told_and_the_exit_code(
    server: Live, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(monkeypatch, server.url, "closed:2:4:3:2", "--model", "other") == 1
    result = json.loads(capsys.readouterr().out.splitlines()[0])
    assert (result["errors"], result["tokens"], result["ttft_p50"]) == (4, 0, None)
    assert result["first_error"].startswith("404") and "other" in result["first_error"]


def test_a_server_that_is_not_there_or_not_open_is_one_sentence(
    server: Live, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(monkeypatch, "http://127.0.0.1:9", "closed:1:1:1:1") == 1
    assert bench(monkeypatch, server.url, "closed:1:1:1:1", key="") == 1
    assert capsys.readouterr().err.count("does not answer as an OpenAI server does") == 2


@pytest.mark.parametrize(
    "text",
    ["closed", "closed:1:2:3", "closed:0:1:1:1", "half:1:1:1:1", "closed:1.5:1:1:1", "open:1:1:1:x", "open:1:0:1:1"],
)
def test_a_case_that_cannot_be_meant_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="a case is"):
        parse(text)


def test_cases_are_parsed_and_processes_have_work() -> None:
    assert parse("open:0.5:600:512:128:warm") == (Case("open", 0.5, 600, 512, 128), True)
    assert [clients_for(Case("closed", n, 100, 1, 1), 4) for n in (1, 3, 64)] == [1, 3, 4]
    assert clients_for(Case("open", 0.5, 100, 1, 1), 4) == 4


def test_prompts_depend_on_seed_and_number_alone() -> None:
    job = Job("", "", Case("closed", 2, 4, 30, 1), 0, 2, 7, 50)
    prompts = [prompt(job, i) for i in range(4)]
    assert prompts == [prompt(msgspec.structs.replace(job, share=1, shares=3), i) for i in range(4)]
    assert len({tuple(p) for p in prompts}) == 4 and all(0 <= i < 50 for p in prompts for i in p)
    assert prompt(msgspec.structs.replace(job, seed=8), 0) != prompts[0]


def test_figures_are_those_of_the_requests_that_succeeded() -> None:
    def record(ttft_s: float, e2e_s: float, **changes: Any) -> Record:
        return Record(0.0, 200, ttft_s, e2e_s, 11, [0.01, 0.03], **changes)

    refused = Record(0.0, 429, error="429 queue_full")
    parts = [Done(2.0, [record(0.1, 1.1)]), Done(4.0, [record(0.3, 2.3), refused])]
    result = summary(parts, slo_ttft_ms=200, slo_tpot_ms=150)
    assert (result["tokens"], result["tok_s"], result["req_s"]) == (22, 5.5, 0.5)
    assert (result["errors"], result["first_error"]) == (1, "429 queue_full")
    assert result["statuses"] == {"200": 2, "429": 1}
    assert (result["goodput_req_s"], result["goodput_share"]) == (0.25, 0.3333)
    assert (result["ttft_p50"], result["ttft_mean"], result["tpot_p50"]) == (300, 200, 200)
    assert summary(parts, slo_tpot_ms=150)["goodput_req_s"] == 0.25
    assert summary(parts)["goodput_req_s"] == 0.5
    assert percentiles([i / 1000 for i in range(100)]) == {"mean": 49.5, "p50": 50, "p90": 90, "p95": 95, "p99": 99}
    assert set(percentiles([]).values()) == {None}
