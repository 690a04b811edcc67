"""tools/simulate_load.py, which drives the real engine in virtual time, goes on working."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from tpqwen.bench.serve import parse


def test_more_streams_give_more_tokens_in_all() -> None:
    path = Path(__file__).parents[2] / "tools" / "simulate_load.py"
    spec = importlib.util.spec_from_file_location("simulate_load", path)
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    figures = [tool.simulate(parse(f"closed:{n}:{2 * n}:64:16")[0], 1e-3, 3e-3, 1e-3) for n in (1, 8)]
    assert 0 < figures[0]["tok_s"] < figures[1]["tok_s"]
    assert all(0 < f["ttft_p50"] <= f["ttft_p99"] for f in figures)
