"""`tpqwen compare`: naive recomputation, cached one at a time, and continuous batching on the same weights.

Naive runs the whole sequence through the model for every token and keeps nothing; the other two are the engine with one
and with all requests. Their greedy tokens are compared and the command fails when they differ. In 16-bit numbers the
methods round differently, so a sequence may part from another method's where two tokens are equally likely but for
rounding (TIES); how many did, and how far apart the tokens were, stands beside the table.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from random import Random

from rich.console import Console
from rich.table import Table

from tpqwen.bench.environment import environment
from tpqwen.config import Config
from tpqwen.errors import EngineError
from tpqwen.model.config import ModelConfig
from tpqwen.model.hub import resolve_model
from tpqwen.model.sizing import derive
from tpqwen.offline import OfflineEngine
from tpqwen.request import GenerateRequest, SamplingParams
from tpqwen.step import Admit, Chunk, RowParams, StepInput, ints, packed

GREEDY = RowParams(0.0, 0, 1.0, 0.0, 0, 0)
METHODS = ("naive", "cached", "batched")
TOP = 20  # likeliest tokens that are asked for where two sequences part
TIES = {"float32": 0.0, "float16": 0.02, "bfloat16": 0.1}  # log-probability; bf16 has steps of 0.03 at logits above 4


@dataclass(frozen=True)
class Measured:
    """One method on one load. Times in seconds, extrapolated when not all requests ran; memory of all ranks, in MiB."""

    method: str
    requests: int
    tokens: int
    seconds: float
    requests_per_s: float
    peak_memory_mib: float
    measured_requests: int


@dataclass(frozen=True)
class Agreement:
    """What comparing the tokens came to. largest_gap: of the log-probabilities of the tokens where methods part."""

    sequences: int
    parted: int
    largest_gap: float
    tie: float  # up to which gap it is rounding

    @property
    def holds(self) -> bool:
        return self.largest_gap <= self.tie

    def __str__(self) -> str:
        if not self.parted:
            return "greedy tokens of all methods agree"
        where = f"{self.parted} of {self.sequences} sequences part, at tokens up to {self.largest_gap:.3f} apart"
        return f"greedy tokens agree but for near ties: {where}" if self.holds else f"greedy tokens DIFFER: {where}"


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
        self.engine.executor.peak_memory()  # what was before does not count
        call: Callable[[list[list[int]], int], list[list[int]]] = getattr(self, method)
        begin = time.perf_counter()
        outputs = call(prompts[:run], num_tokens)
        seconds = (time.perf_counter() - begin) * len(prompts) / run
        rate, peak = len(prompts) / seconds, sum(self.engine.executor.peak_memory()) / 2**20
        return Measured(method, len(prompts), num_tokens, seconds, rate, peak, run), outputs

    def warm_up(self, requests: int, prompt_tokens: int, longest: int) -> None:
        """Make every kernel and graph that is going to be used: naive passes grow up to `longest` tokens."""
        vocab = self.engine.model_config.vocab_size
        self.batched(prompts_of(requests, prompt_tokens, vocab, 1), 4)
        self.cached(prompts_of(1, prompt_tokens, vocab, 1), 4)
        length = prompt_tokens
        while length < longest:
            self.naive(prompts_of(1, length, vocab, 1), 1)
            length *= 2
        self.naive(prompts_of(1, longest, vocab, 1), 1)

    def agreement(self, prompts: list[list[int]], outputs: dict[str, list[list[int]]]) -> Agreement:
        """Compare every method's tokens with those of the batch, up to where a sequence parts."""
        pairs = [
            (prompt, ours, theirs)
            for method in METHODS[:-1]
            for prompt, ours, theirs in zip(prompts, outputs[method], outputs["batched"], strict=False)
        ]
        gaps = []
        for prompt, ours, theirs in pairs:
            at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
            if at is not None:
                gaps.append(self._gap([*prompt, *ours[:at]], ours[at], theirs[at]))
        return Agreement(len(pairs), len(gaps), max(gaps, default=0.0), TIES[self.engine.capacity.kv_dtype])

    def _gap(self, ids: list[int], one: int, other: int) -> float:
        """How far apart the log-probabilities are that the one token and the other come after ids."""
        params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, logprobs=TOP)
        for deltas in self.engine.run([self.engine.request(ids, params)]):
            for score in (s for d in deltas for s in d.logprobs or () if s is not None):
                likely = dict(zip(score.top_ids, score.top_logprobs, strict=True))
                if one in likely and other in likely:
                    return abs(likely[one] - likely[other])
        return math.inf

    def _naive_one(self, prompt: list[int], num_tokens: int) -> list[int]:
        executor, capacity = self.engine.executor, self.engine.capacity
        sequence = list(prompt)
        for step in range(num_tokens):
            blocks = -(-len(sequence) // capacity.block_size)
            executor.submit(
                StepInput(
                    epoch=self.engine.core.scheduler.epoch,
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
    engine = _engine(config, longest)
    try:
        comparison = Comparison(engine)
        vocab = engine.model_config.vocab_size
        _tell("warming up")
        comparison.warm_up(args.requests, args.prompt_tokens, longest)
        load = prompts_of(args.requests, args.prompt_tokens, vocab, 2)
        rows, agreement = _methods(comparison, load, args.tokens, min(args.naive_requests, args.requests))
        curve = [_at_length(comparison, prompts_of(1, args.prompt_tokens, vocab, 3), n) for n in lengths]
    finally:
        engine.close()
    report = {
        "environment": environment(config.parallel.device),
        "model": str(config.model.model),
        "methods": [asdict(r) for r in rows],
        "by_length": curve,
        "greedy_tokens_agree": agreement.holds,
        "sequences": asdict(agreement),
    }
    _print(rows, curve, agreement)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))
    if args.plot:
        _plot(curve, args.plot)
    return 0 if agreement.holds else 1


def _engine(config: Config, longest: int) -> OfflineEngine:
    """An engine that takes `longest` tokens in one step, as naive passes do."""
    model = ModelConfig.from_folder(resolve_model(config.model.model, config.model.revision))
    options = {k: v for k, v in config.flat().items() if v is not None}
    options["prefix_cache"] = False
    options["max_batched_tokens"] = max(derive(config, model).max_batched_tokens, longest)
    return OfflineEngine(Config.load(options, {}))


def _methods(
    comparison: Comparison, prompts: list[list[int]], num_tokens: int, naive_requests: int
) -> tuple[list[Measured], Agreement]:
    limits = {"naive": naive_requests, "cached": min(len(prompts), 4 * naive_requests), "batched": len(prompts)}
    rows, outputs = [], {}
    for method in METHODS:
        _tell(f"{method}: {limits[method]} of {len(prompts)} requests")
        row, outputs[method] = comparison.measure(method, prompts, num_tokens, limits[method])
        rows.append(row)
    return rows, comparison.agreement(prompts, outputs)


def _at_length(comparison: Comparison, prompts: list[list[int]], num_tokens: int) -> dict[str, float]:
    """Seconds for one sequence of num_tokens, naive and cached."""
    _tell(f"one sequence of {num_tokens} tokens")
    naive, _ = comparison.measure("naive", prompts, num_tokens, 1)
    cached, _ = comparison.measure("cached", prompts, num_tokens, 1)
    return {"tokens": num_tokens, "naive_s": naive.seconds, "cached_s": cached.seconds}


def _tell(text: str) -> None:
    """What is being done now: some of it takes minutes on a CPU."""
    print(text, file=sys.stderr, flush=True)


def _print(rows: list[Measured], curve: list[dict[str, float]], agreement: Agreement) -> None:
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
    console.print(str(agreement), style="" if agreement.holds else "red")


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
