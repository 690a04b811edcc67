"""`tpqwen compare`: three methods, the same greedy tokens, a table, JSON and a picture."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from tpqwen.bench import compare
from tpqwen.config import Config


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
