"""`tpqwen bench offline`: the named workloads through the engine in this process, no HTTP.

Each workload is warmed up with seed 1 and measured with seeds 2 and 3; both are reported, the table shows the better.
Prefix cache off; tokens/s are output tokens per second of wall time. Of decode steps also: host_us, what the engine's
thread works for one at the median, and on a GPU gpu_idle, the share of the time in which it had nothing to do.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from tpqwen.bench.environment import environment
from tpqwen.bench.workloads import WORKLOADS, Workload
from tpqwen.config import Config
from tpqwen.errors import ConfigError, EngineError
from tpqwen.offline import OfflineEngine
from tpqwen.request import SamplingParams
from tpqwen.step import StepStats


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command beside the model's own."""
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=f"any of {', '.join(WORKLOADS)}; default all")
    parser.add_argument("--save", type=Path, help="write the results as JSON here")
    parser.add_argument("--compare", type=Path, help="show the change against an earlier --save")


def run(args: argparse.Namespace, config: Config) -> int:
    """The command: one JSON line per measured run, then a table. Returns the exit code."""
    names = args.workloads or list(WORKLOADS)
    for name in names:
        if name not in WORKLOADS:
            raise ConfigError(f"unknown workload {name!r}; known are {', '.join(WORKLOADS)}")
    options = {k: v for k, v in config.flat().items() if v is not None}
    engine = OfflineEngine(Config.load(options | {"prefix_cache": False}, {}))
    gc.collect()
    gc.freeze()  # as in the server's processes: looking for garbage in weights and modules would pause steps
    facts = environment(config.parallel.device)
    results: list[dict[str, Any]] = []
    try:
        for name in names:
            measure(engine, WORKLOADS[name](1))
            for seed in (2, 3):
                workload, steps = WORKLOADS[name](seed), DecodeSteps()
                engine.on_stats = steps.observe
                seconds = measure(engine, workload)
                results.append(
                    {
                        "engine": "tpqwen",
                        "model": Path(config.model.model).name,
                        "workload": name,
                        "s": round(seconds, 4),
                        "tok_s": round(workload.output_tokens / seconds, 1),
                        **steps.figures(),
                    }
                )
                print(json.dumps(results[-1]), flush=True)
    finally:
        engine.close()
        gc.unfreeze()
    old = json.loads(args.compare.read_text())["results"] if args.compare else []
    _print(results, old)
    if args.save:
        args.save.write_text(json.dumps({"environment": facts, "results": results}, indent=1))
    return 0


class DecodeSteps:
    """What decode steps cost besides their computation, from the StepStats of a run."""

    def __init__(self) -> None:
        self._host_s: list[float] = []
        self._idle_s = 0.0
        self._watched_s = 0.0

    def observe(self, stats: StepStats) -> None:
        """One more step."""
        if stats.phase == "decode":
            self._host_s.append(stats.host_s)
        if stats.idle_s is not None:
            self._idle_s += stats.idle_s
            self._watched_s += stats.duration_s

    def figures(self) -> dict[str, float]:
        """host_us and gpu_idle, each where there is something to tell."""
        figures = {}
        if self._host_s:
            figures["host_us"] = round(statistics.median(self._host_s) * 1e6, 1)
        if self._watched_s:
            figures["gpu_idle"] = round(self._idle_s / self._watched_s, 4)
        return figures


def measure(engine: OfflineEngine, workload: Workload) -> float:
    """Seconds from the first submission to the last token. Raises EngineError when an answer is short."""
    size = engine.model_config.vocab_size  # the workloads' ids are in any real Qwen3's; tiny models have fewer
    params = SamplingParams(temperature=workload.temperature, ignore_eos=True)
    requests = [
        engine.request([t % size for t in p], msgspec.structs.replace(params, max_tokens=n))
        for p, n in zip(workload.prompts, workload.max_tokens, strict=True)
    ]
    counts: Counter[str] = Counter()
    begin = time.perf_counter()
    for deltas in engine.run(requests):
        counts.update(deltas.ids)
        for d in deltas.others:
            counts[d.id] += len(d.token_ids)
    seconds = time.perf_counter() - begin
    if [counts[r.id] for r in requests] != workload.max_tokens:
        raise EngineError("a request ended with another number of tokens than asked for")
    return seconds


def _best(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    best: dict[str, dict[str, Any]] = {}
    for r in results:
        if r["workload"] not in best or r["s"] < best[r["workload"]]["s"]:
            best[r["workload"]] = r
    return best


def _print(results: list[dict[str, Any]], old: list[dict[str, Any]]) -> None:
    table = Table(title=f"{results[0]['model']}, better of two runs")
    for name in ("workload", "seconds", "tok/s", "host (us)", "GPU idle", *(["change"] if old else [])):
        table.add_column(name, justify="left" if name == "workload" else "right")
    before = _best(old)
    for name, r in _best(results).items():
        change = [f"{before[name]['s'] / r['s'] - 1:+.1%}" if name in before else "new"] if old else []
        steps = [f"{r['host_us']:.0f}" if "host_us" in r else "-", f"{r['gpu_idle']:.1%}" if "gpu_idle" in r else "-"]
        table.add_row(name, f"{r['s']:.4f}", f"{r['tok_s']:.1f}", *steps, *change)
    Console().print(table)
