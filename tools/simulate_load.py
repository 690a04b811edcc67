"""Loads in virtual time: the real EngineCore, scheduler and pace over a device that is a formula.

    python tools/simulate_load.py closed:64:3000:512:128 open:60:1200:512:128

A CASE is as in `tpqwen bench serve`. It shows what scheduling alone costs or wins, not what a machine does: the
formula's defaults are fitted to two offline figures of 0.6B on one H100 (docs/benchmarks/h200.md), and what a pass with
prompts costs besides its tokens (--pass-ms) to the steps of a server there. Attention of prompts is left out.
"""

from __future__ import annotations

import argparse
import heapq
import random
from collections import deque

import numpy as np

from tpqwen.bench.load import Case
from tpqwen.bench.serve import parse, percentiles
from tpqwen.engine.core import EngineCore
from tpqwen.engine.line import TOGETHER
from tpqwen.request import GenerateRequest, SamplingParams
from tpqwen.step import (
    MANY_CHUNKS,
    TOKEN_BUCKETS,
    Capacity,
    RankStats,
    StepInput,
    StepOutput,
    ints,
    packed,
    token_bucket,
)

STEP_S, ROW_S, CONTEXT_TOKEN_S = 1.1e-3, 1.8e-6, 3.95e-8  # of a decode step: its own, per row, per token of context
PROMPT_TOKEN_S = 2.1e-6
LAUNCH_S = 10e-3  # at least: a pass that is launched kernel by kernel
HOST_S = 0.15e-3  # between two steps of the engine
PARAMS = SamplingParams()
CAPACITY = Capacity(
    num_blocks=36_000,
    block_size=16,
    max_num_seqs=256,
    max_model_len=40_960,
    max_batched_tokens=16_640,
    graph_tokens=TOKEN_BUCKETS[-1],
    graph_chunks=MANY_CHUNKS,
    launch_tokens=12_000,
)


class Device:
    """Implements executor.protocol.Executor. It runs one step after another; `now` is the host's clock, seconds."""

    depth = 2

    def __init__(self, pass_s: float) -> None:
        self.now = 0.0
        self.prompt_tokens = self.padded_tokens = 0
        self._pass_s = pass_s
        self._free_at = 0.0
        self._rows = np.empty(0, np.int32)
        self._context = np.zeros(CAPACITY.max_num_seqs, np.int64)
        self._running: deque[tuple[StepInput, int, float]] = deque()  # with rows that sample, and when it ends

    def start(self) -> Capacity:
        return CAPACITY

    def submit(self, step: StepInput) -> None:
        self.now += HOST_S
        if step.decode is not None:
            self._rows = ints(step.decode)
        self._free_at = max(self.now, self._free_at) + self._seconds(step)
        self._context[self._rows] += 1
        for chunk in step.chunks:
            self._context[chunk.slot] = chunk.start + chunk.num_tokens
        sampled = len(self._rows) + sum(chunk.sample for chunk in step.chunks)
        self._running.append((step, sampled, self._free_at))

    def collect(self, timeout_s: float) -> StepOutput:
        step, sampled, ends_at = self._running.popleft()
        self.now = max(self.now, ends_at)
        return StepOutput(step.epoch, step.step, packed(np.full(sampled, 5)))

    def ready(self) -> bool:
        return bool(self._running) and self._running[0][2] <= self.now

    def repair(self, error: Exception) -> Capacity:
        raise error

    def stats(self) -> list[RankStats]:
        return []

    def stop(self) -> None:
        """Nothing to stop."""

    def _seconds(self, step: StepInput) -> float:
        decode = len(self._rows) * ROW_S + int(self._context[self._rows].sum()) * CONTEXT_TOKEN_S
        tokens = step.num_chunk_tokens
        if not tokens:
            return STEP_S + decode
        size = token_bucket(tokens, len(step.chunks))
        self.prompt_tokens += tokens
        self.padded_tokens += max(size, tokens)
        seconds = STEP_S + decode + self._pass_s + max(size, tokens) * PROMPT_TOKEN_S
        return seconds if size else max(seconds, LAUNCH_S)


def simulate(
    case: Case, pass_s: float, think_s: float, serve_s: float, together: int = TOGETHER
) -> dict[str, float | None]:
    """Figures of one case. A client asks again think_s after its answer's end; serve_s: of the server's process for
    each request, one after another. Of those whose answers ended in one step so many go to the engine at once."""
    device, chance = Device(pass_s), random.Random(1)
    core = EngineCore(device, CAPACITY, clock=lambda: device.now)
    begun: dict[str, float] = {}
    last: dict[str, float] = {}
    ttft: list[float] = []
    gaps: list[float] = []
    arrivals: list[float] = []
    at_s = busy_until = 0.0
    for _ in range(case.requests if case.kind == "open" else int(case.level)):
        arrivals.append(at_s)
        at_s += chance.expovariate(case.level) if case.kind == "open" else serve_s
    while arrivals or core.has_work:
        if not core.has_work:
            device.now = max(device.now, arrivals[0])
        while arrivals and arrivals[0] <= device.now and len(begun) < case.requests:
            name = str(len(begun))
            begun[name] = heapq.heappop(arrivals)
            ids = [chance.randrange(10_000) for _ in range(case.prompt_tokens)]
            core.add(GenerateRequest(id=name, prompt_ids=ids, params=PARAMS, max_tokens=case.output_tokens, seed=1))
        again: list[float] = []
        for delta in core.step().deltas:
            (gaps if delta.id in last else ttft).append(device.now - last.get(delta.id, begun[delta.id]))
            last[delta.id] = device.now
            asked = len(begun) + len(arrivals) + len(again)
            if delta.finish_reason is not None and case.kind == "closed" and asked < case.requests:
                busy_until = max(busy_until, device.now + think_s) + serve_s
                again.append(busy_until)
        for at_s in _gathered(again, together):
            heapq.heappush(arrivals, at_s)
    figures = {f"{name}_{key}": ms for name, v in (("ttft", ttft), ("itl", gaps)) for key, ms in percentiles(v).items()}
    padding = 1 - device.prompt_tokens / device.padded_tokens
    return {"tok_s": round(len(begun) * case.output_tokens / device.now), "padding": round(padding, 3)} | figures


def _gathered(times: list[float], together: int) -> list[float]:
    """Each waits for the last one of its group."""
    return [times[min(i - i % together + together, len(times)) - 1] for i in range(len(times))]


def main() -> None:
    """Print one line per case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", metavar="CASE")
    parser.add_argument("--pass-ms", type=float, default=1.1, help="of a pass with prompts, besides its tokens")
    parser.add_argument("--think-ms", type=float, default=3.0, help="between an answer and the next request")
    parser.add_argument("--serve-ms", type=float, default=1.0, help="of the server's process for each request")
    parser.add_argument("--together", type=int, default=TOGETHER, help="requests that reach the engine at once at most")
    args = parser.parse_args()
    for text in args.cases:
        case, _ = parse(text)
        figures = simulate(case, args.pass_ms / 1e3, args.think_ms / 1e3, args.serve_ms / 1e3, args.together)
        shown = ("tok_s", "ttft_p50", "ttft_p99", "itl_p50", "itl_p99", "padding")
        print(case.name, " ".join(f"{name}={figures[name]}" for name in shown), flush=True)


if __name__ == "__main__":
    main()
