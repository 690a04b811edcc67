"""`tpqwen compare`: naive recomputation, cached one at a time, and continuous batching on the same weights.

Naive runs the whole sequence through the model for every token and keeps nothing; the other two are the engine with one
and with all requests. The command refuses to print a table when their greedy tokens differ.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from random import Random

from rich.console import Console
from rich.table import Table

from tpqwen.bench.environment import environment, peak_memory_mib, reset_peak_memory
from tpqwen.config import Config
from tpqwen.errors import EngineError
from tpqwen.offline import OfflineEngine
from tpqwen.request import GenerateRequest, SamplingParams
from tpqwen.step import Admit, Chunk, RowParams, StepInput, ints, packed

GREEDY = RowParams(0.0, 0, 1.0, 0.0, 0, 0)
METHODS = ("naive", "cached", "batched")


@dataclass(frozen=True)
class Measured:
    """One method on one load. Times in seconds, memory in MiB, extrapolated when not all requests were run."""

    method: str
    requests: int
    tokens: int
    seconds: float
    requests_per_s: float
    peak_memory_mib: float
    measured_requests: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command; the model's own come from the command line's common set."""
    parser.add_argument("--requests", type=int, default=100, help="number of requests (default 100)")
    parser.add_argument("--tokens", type=int, default=50, help="tokens generated per request (default 50)")
    parser.add_argument("--prompt-tokens", type=int, default=32, help="prompt length (default 32)")
    parser.add_argument(
        "--lengths", default="50,200,500,1000", help="sequence lengths of the second table, '' for none"
    )
    parser.add_argument(
        "--naive-requests", type=int, default=4, help="requests that naive really runs; its time is scaled to all"
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, help="draw time against sequence length into this PNG")


class Comparison:
    """The three methods over one loaded engine. max_tokens of a request is exact: end tokens are ignored."""

    def __init__(self, engine: OfflineEngine) -> None:
        self.engine = engine

    def naive(self, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        """Every token from the whole sequence, one request at a time."""
        return [self._naive_one(p, num_tokens) for p in prompts]

    def cached(self, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        """With the KV cache, one request at a time."""
        return [self._run([p], num_tokens)[0] for p in prompts]

    def batched(self, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        """All requests at once."""
        return self._run(prompts, num_tokens)

    def measure(
        self, method: str, prompts: list[list[int]], num_tokens: int, run: int
    ) -> tuple[Measured, list[list[int]]]:
        """Run `run` of the prompts with one method and scale the time to all of them."""
        reset_peak_memory()
        call: Callable[[list[list[int]], int], list[list[int]]] = getattr(self, method)
        begin = time.perf_counter()
        outputs = call(prompts[:run], num_tokens)
        seconds = (time.perf_counter() - begin) * len(prompts) / run
        rate = len(prompts) / seconds
        return Measured(method, len(prompts), num_tokens, seconds, rate, peak_memory_mib(), run), outputs

    def _naive_one(self, prompt: list[int], num_tokens: int) -> list[int]:
        executor, capacity = self.engine.executor, self.engine.capacity
        sequence = list(prompt)
        for step in range(num_tokens):
            blocks = -(-len(sequence) // capacity.block_size)
            executor.submit(
                StepInput(
                    epoch=0,
                    step=step,
                    admits=(Admit(0, GREEDY, 0, len(sequence)),),
                    blocks=packed([(0, i, 1 + i) for i in range(blocks)]),
                    chunks=(Chunk(0, 0, packed(sequence), True),),
                    decode=b"",
                )
            )
            sequence.append(int(ints(executor.collect(60.0).tokens)[0]))
        return sequence[len(prompt) :]

    def _run(self, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        requests: list[GenerateRequest] = [self.engine.request(p, params) for p in prompts]
        outputs: dict[str, list[int]] = {r.id: [] for r in requests}
        for deltas in self.engine.run(requests):
            for d in deltas:
                if d.error:
                    raise EngineError(d.error)
                outputs[d.id] += d.token_ids
        return [outputs[r.id] for r in requests]


def prompts_of(count: int, length: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Random token ids; the model's speed does not depend on them."""
    random = Random(seed)
    return [[random.randrange(min(vocab_size, 10000)) for _ in range(length)] for _ in range(count)]


def run(args: argparse.Namespace, config: Config) -> int:
    """The command. Returns the exit code; 1 when the methods disagree."""
    lengths = [int(x) for x in args.lengths.split(",") if x]
    longest = max([args.prompt_tokens + args.tokens, *(args.prompt_tokens + n for n in lengths)])
    options = {k: v for k, v in config.flat().items() if v is not None}
    options["prefix_cache"] = False
    options["max_batched_tokens"] = max(config.schedule.max_batched_tokens or 0, longest, 512)
    engine = OfflineEngine(Config.load(options, {}))
    try:
        comparison = Comparison(engine)
        vocab = engine.model_config.vocab_size
        comparison.batched(prompts_of(args.requests, args.prompt_tokens, vocab, 1), 4)  # warm up: kernels, graphs
        comparison.naive(prompts_of(1, args.prompt_tokens, vocab, 1), 2)
        load = prompts_of(args.requests, args.prompt_tokens, vocab, 2)
        rows, agree = _methods(comparison, load, args.tokens, min(args.naive_requests, args.requests))
        curve = [_at_length(comparison, prompts_of(1, args.prompt_tokens, vocab, 3), n) for n in lengths]
    finally:
        engine.close()
    report = {
        "environment": environment(),
        "model": str(config.model.model),
        "methods": [asdict(r) for r in rows],
        "by_length": curve,
        "greedy_tokens_agree": agree,
    }
    _print(rows, curve, agree)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))
    if args.plot:
        _plot(curve, args.plot)
    return 0 if agree else 1


def _methods(
    comparison: Comparison, prompts: list[list[int]], num_tokens: int, naive_requests: int
) -> tuple[list[Measured], bool]:
    limits = {"naive": naive_requests, "cached": min(len(prompts), 4 * naive_requests), "batched": len(prompts)}
    rows, outputs = [], {}
    for method in METHODS:
        row, outputs[method] = comparison.measure(method, prompts, num_tokens, limits[method])
        rows.append(row)
    agree = all(outputs[m] == outputs["batched"][: len(outputs[m])] for m in METHODS)
    return rows, agree


def _at_length(comparison: Comparison, prompts: list[list[int]], num_tokens: int) -> dict[str, float]:
    """Seconds for one sequence of num_tokens, naive and cached."""
    naive, _ = comparison.measure("naive", prompts, num_tokens, 1)
    cached, _ = comparison.measure("cached", prompts, num_tokens, 1)
    return {"tokens": num_tokens, "naive_s": naive.seconds, "cached_s": cached.seconds}


def _print(rows: list[Measured], curve: list[dict[str, float]], agree: bool) -> None:
    console, base = Console(), rows[0].seconds
    table = Table(title=f"{rows[0].requests} requests of {rows[0].tokens} tokens")
    for name in ("method", "time (s)", "requests/s", "speed-up", "peak memory (MiB)", "requests run"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for r in rows:
        table.add_row(
            r.method,
            f"{r.seconds:.3f}",
            f"{r.requests_per_s:.2f}",
            f"{base / r.seconds:.1f}x",
            f"{r.peak_memory_mib:.0f}",
            str(r.measured_requests),
        )
    console.print(table)
    if curve:
        table = Table(title="one sequence, time against its length")
        for name in ("tokens", "naive (s)", "cached (s)", "speed-up"):
            table.add_column(name, justify="right")
        for c in curve:
            ratio = f"{c['naive_s'] / c['cached_s']:.1f}x"
            table.add_row(str(int(c["tokens"])), f"{c['naive_s']:.3f}", f"{c['cached_s']:.3f}", ratio)
        console.print(table)
    console.print("greedy tokens of all methods agree" if agree else "[red]greedy tokens DIFFER between methods[/]")


def _plot(curve: list[dict[str, float]], path: Path) -> None:
    figure_module = import_module("matplotlib.figure")  # the bench extra; only --plot needs it
    figure = figure_module.Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    tokens = [c["tokens"] for c in curve]
    axes.plot(tokens, [c["naive_s"] for c in curve], marker="o", label="naive: whole sequence for each token")
    axes.plot(tokens, [c["cached_s"] for c in curve], marker="o", label="with the KV cache")
    axes.set(xlabel="tokens generated", ylabel="seconds", yscale="log", title="one sequence, greedy")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
