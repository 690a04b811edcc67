"""What a steady decode step costs the host, stage by stage: microseconds at the median, for docs/LOG.md.

    python tools/measure_host.py --rows 1,32,256                              # without a device: it computes nothing
    python tools/measure_host.py --rows 1,32,256 --device cuda --model FOLDER --profile

On a CPU the worker is real but for the pass itself, which is left out: its tokens are whatever stands in the ring. On
a GPU everything is real, with random weights, and `collect` holds the wait for the device.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import pstats
import statistics
import time
from collections.abc import Callable
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np

from tpqwen.bench.workloads import MAX_ID
from tpqwen.config import EMBEDDED_MODEL, Config
from tpqwen.engine.messages import Batch, decode_report, encode
from tpqwen.offline import OfflineEngine
from tpqwen.request import SamplingParams

STEPS = 400
WARM_UP = 60
PROMPT = 32


def main() -> None:
    """Print one line per number of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,32,256")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default=EMBEDDED_MODEL)
    parser.add_argument("--profile", action="store_true", help="by function, at the last number of rows")
    args = parser.parse_args()
    options = {"model": args.model, "random_weights": True, "prefix_cache": False, "device": args.device}
    small = (
        {
            "max_num_seqs": 256,
            "max_model_len": 1024,
            "block_size": 64,
            "num_kv_blocks": 4096,
            "max_batched_tokens": 16384,
        }
        if args.device == "cpu"
        else {}
    )
    engine = OfflineEngine(Config.load(options | small, {}))
    if args.device == "cpu":
        _leave_out_passes(engine)
    gc.collect()
    gc.freeze()
    gc.disable()
    counts = [int(r) for r in args.rows.split(",")]
    for count in counts:
        measure(engine, count, show=args.profile and count == counts[-1])
    engine.close()


def measure(engine: OfflineEngine, count: int, *, show: bool) -> None:
    """One line of stages; the sum is what the host does between two passes, without waiting."""
    random, core = Random(0), engine.core
    params = SamplingParams(temperature=0.6, max_tokens=900, ignore_eos=True)
    # lengths differ, as they do in service, so that not all rows need a block in the same step
    prompts = [[random.randrange(MAX_ID) % 300 for _ in range(PROMPT + i % 64)] for i in range(count)]
    requests = [engine.request(p, params) for p in prompts]
    for r in requests:
        core.add(r)
    for _ in range(WARM_UP):
        core.step()
    assert core.scheduler.num_running == count
    spans: dict[str, list[float]] = {}
    executor, scheduler = engine.executor, core.scheduler
    kept = [(o, n, getattr(o, n)) for o, n in ((scheduler, "schedule"), (executor, "submit"), (scheduler, "update"))]
    kept.append((executor, "collect", executor.collect))
    for owner, name, call in kept:
        setattr(owner, name, _timed(call, spans.setdefault(name, [])))
    profile = cProfile.Profile()
    for i in range(STEPS):
        if show and i == STEPS // 2:
            profile.enable()
        begin = time.perf_counter()
        result = core.step()
        spans.setdefault("step", []).append(time.perf_counter() - begin)
        begin = time.perf_counter()
        data = encode(Batch(result.deltas, result.stats))
        spans.setdefault("encode", []).append(time.perf_counter() - begin)
        begin = time.perf_counter()
        decode_report(data)
        spans.setdefault("decode", []).append(time.perf_counter() - begin)
    profile.disable()
    for owner, name, call in kept:
        setattr(owner, name, call)
    medians = {name: statistics.median(s[: STEPS // 2]) * 1e6 for name, s in spans.items()}
    means = {name: statistics.mean(s[: STEPS // 2]) * 1e6 for name, s in spans.items()}
    medians["rest"] = medians["step"] - sum(medians[n] for n in ("schedule", "submit", "collect", "update"))
    total = medians["step"] - medians["collect"] * (engine.config.parallel.device == "cuda")
    stages = ", ".join(f"{n} {medians[n]:.0f}" for n in ("schedule", "submit", "collect", "update", "rest"))
    print(
        f"{count} rows: {total:.0f} us (mean {means['step']:.0f}) = {stages}; "
        f"a report: encode {medians['encode']:.0f}, decode {medians['decode']:.0f}, {len(data)} bytes",
        flush=True,
    )
    if show:
        pstats.Stats(profile).sort_stats("tottime").print_stats(30)
    for r in requests:
        core.abort(r.id)
    while core.has_work:
        core.step()


def _timed(call: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    def timed(*args: Any) -> Any:
        begin = time.perf_counter()
        try:
            return call(*args)
        finally:
            seconds.append(time.perf_counter() - begin)

    return timed


def _leave_out_passes(engine: OfflineEngine) -> None:
    """The worker's decode passes and prompts compute nothing; its turns are counted as the device would."""
    worker: Any = engine.executor._worker  # type: ignore[attr-defined]
    state = worker.runner.state.tensors
    nothing = SimpleNamespace(logprobs=None, prompt_scores=(), pooled=None)
    worker.graphs.decode = lambda kind: nothing
    worker.runner.mixed = lambda *_, wide: nothing
    state.ring.numpy()[:] = np.arange(state.ring.numel()).reshape(state.ring.shape) % 300


if __name__ == "__main__":
    main()
