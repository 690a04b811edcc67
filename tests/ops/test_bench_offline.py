"""`tpqwen bench offline`: its figures of decode steps, and a run from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from tpqwen import cli
from tpqwen.bench import offline
from tpqwen.bench.offline import DecodeSteps
from tpqwen.bench.workloads import fixed
from tpqwen.config import EMBEDDED_MODEL
from tpqwen.step import StepStats

STATS = StepStats(
    duration_s=0.001,
    phase="decode",
    num_tokens=4,
    num_running=4,
    num_waiting=0,
    blocks_used=4,
    blocks_cached=0,
    blocks_free=4,
    preemptions=0,
    prefix_queried_tokens=0,
    prefix_hit_tokens=0,
    prompt_tokens=0,
    output_tokens=4,
)


def test_figures_are_of_decode_steps_and_only_where_something_was_measured() -> None:
    steps = DecodeSteps()
    assert steps.figures() == {}
    steps.observe(msgspec.structs.replace(STATS, phase="mixed", host_s=1.0))
    assert steps.figures() == {}
    for host_us in (300, 100, 110):
        steps.observe(msgspec.structs.replace(STATS, host_s=host_us * 1e-6))
    assert steps.figures() == {"host_us": 110.0}
    steps.observe(msgspec.structs.replace(STATS, host_s=120e-6, idle_s=30e-6))
    steps.observe(msgspec.structs.replace(STATS, host_s=90e-6, idle_s=0.0, duration_s=0.002))
    assert steps.figures() == {"host_us": 110.0, "gpu_idle": 0.01}


def test_the_command_prints_a_line_for_each_run_and_compares_with_an_earlier_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(offline, "WORKLOADS", {"few": lambda seed: fixed(3, 5, 4, seed)})
    saved = tmp_path / "few.json"
    assert cli.main(["bench", "offline", EMBEDDED_MODEL, "few", "--device", "cpu", "--save", str(saved)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert len(lines) == 2
    for line in lines:
        assert line["tok_s"] == pytest.approx(12 / line["s"], rel=0.01)
        assert line["host_us"] > 0 and "gpu_idle" not in line
    command = ["bench", "offline", EMBEDDED_MODEL, "few", "--device", "cpu", "--compare", str(saved)]
    assert cli.main([*command, "--quantization", "int8"]) == 0
    assert "change" in capsys.readouterr().out
