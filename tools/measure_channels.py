"""How long a step's message takes to other processes and back: shared-memory ring against TCP on loopback.

Run `python tools/measure_channels.py`; prints a table, asserts nothing.
"""

from __future__ import annotations

import multiprocessing as mp
import statistics
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection

from tpqwen.executor.rank import serve_steps
from tpqwen.executor.ranks import RingExecutor
from tpqwen.executor.wiring import Hub, join
from tpqwen.step import Capacity, Chunk, StepInput, StepOutput, packed

CAPACITY = Capacity(num_blocks=8, block_size=16, max_num_seqs=4, max_model_len=64, max_batched_tokens=64)
ROUNDS = 3000


class EchoWorker:
    """Answers at once, as if the device took no time."""

    def __init__(self) -> None:
        self._steps: list[StepInput] = []

    def submit(self, step: StepInput) -> None:
        self._steps.append(step)

    def ready(self) -> bool:
        return True

    def collect(self) -> StepOutput:
        step = self._steps.pop(0)
        return StepOutput(step.epoch, step.step, packed([step.step]))


def run_rank(rank: int, pipe: Connection) -> None:
    inbox, outbox, answers = join(pipe.recv(), epoch=0)
    pipe.send(answers)
    serve_steps(EchoWorker(), inbox, outbox, epoch=0, answers=rank == 0)


def measure(hosts: Sequence[str], tokens: int) -> tuple[float, float]:
    """Median and 99th percentile of submit + collect, microseconds, one step in flight."""
    context = mp.get_context("spawn")
    hub = Hub(list(hosts), "here", epoch=0)
    pipes, processes = [], []
    for rank, address in enumerate(hub.addresses):
        ours, theirs = context.Pipe()
        process = context.Process(target=run_rank, args=(rank, theirs), daemon=True)
        process.start()
        ours.send(address)
        pipes.append(ours)
        processes.append(process)
    answers = [pipe.recv() if host == "here" else None for pipe, host in zip(pipes, hosts, strict=True)]
    executor = RingExecutor(CAPACITY, hub.connect(answers), depth=1, epoch=0)
    times = []
    for number in range(ROUNDS):
        begin = time.perf_counter()
        executor.submit(StepInput(0, number, (), b"", (Chunk(0, 0, packed([1] * tokens), True),), None))
        executor.collect(10)
        times.append((time.perf_counter() - begin) * 1e6)
    executor.stop()
    for process in processes:
        process.join(10)
    return statistics.median(times), statistics.quantiles(times, n=100)[98]


def main() -> None:
    print(f"{'ranks':28}{'tokens':>8}{'p50 us':>10}{'p99 us':>10}")
    for hosts in (["here"], ["here"] * 2, ["here"] * 4, ["there"], ["there"] * 2):
        for tokens in (1, 2048):
            median, worst = measure(hosts, tokens)
            kind = "ring" if hosts[0] == "here" else "tcp"
            print(f"{f'{len(hosts)} by {kind}':28}{tokens:>8}{median:>10.0f}{worst:>10.0f}")


if __name__ == "__main__":
    main()
