"""A tensor-parallel group whose ranks are threads of this process: every TP path, no processes, no sockets."""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from tpqwen.config import Config
from tpqwen.errors import RankDied
from tpqwen.parallel.group import TPGroup
from tpqwen.step import Capacity, RankStats, StepInput, StepOutput
from tpqwen.worker.worker import Worker


class Meeting:
    """Where the ranks of one group exchange tensors."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=60)
        self.parts: list[torch.Tensor | None] = [None] * size


class ThreadGroup(TPGroup):
    """TPGroup over threads; sums in rank order, so every rank gets the same bits."""

    def __init__(self, rank: int, size: int, meeting: Meeting) -> None:
        super().__init__(rank, size, None)
        self._meeting = meeting

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        m = self._meeting
        m.parts[self.rank] = x
        m.barrier.wait()
        gathered = torch.stack([p for p in m.parts if p is not None])
        m.barrier.wait()
        return gathered

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x.copy_(self.all_gather(x).sum(0))

    def barrier(self) -> None:
        self._meeting.barrier.wait()

    def leave(self) -> None:
        pass


class ThreadedExecutor:
    """Implements Executor: one Worker per rank, each in a thread of its own. Checks that all ranks choose alike."""

    def __init__(self, config: Config, folder: Path) -> None:
        size = config.parallel.tp
        meeting = Meeting(size)
        self.depth = config.schedule.depth
        self.workers = [Worker(config, folder, ThreadGroup(r, size, meeting)) for r in range(size)]
        self._threads = [ThreadPoolExecutor(1) for _ in range(size)]
        self._pending: deque[list[Future[StepOutput]]] = deque()

    def start(self) -> Capacity:
        futures = [t.submit(w.load) for t, w in zip(self._threads, self.workers, strict=True)]
        capacities = [f.result(60) for f in futures]
        return capacities[0]

    def submit(self, step: StepInput) -> None:
        def one(worker: Worker) -> StepOutput:
            worker.submit(step)
            return worker.collect()

        self._pending.append([t.submit(one, w) for t, w in zip(self._threads, self.workers, strict=True)])

    def collect(self, timeout_s: float) -> StepOutput:
        outputs = [f.result(60) for f in self._pending.popleft()]
        assert all(o.tokens == outputs[0].tokens for o in outputs), "ranks chose different tokens"
        return outputs[0]

    def ready(self) -> bool:
        return bool(self._pending) and all(f.done() for f in self._pending[0])

    def repair(self, error: RankDied) -> Capacity:
        raise error

    def stats(self) -> list[RankStats]:
        return [w.stats() for w in self.workers]

    def stop(self) -> None:
        for thread in self._threads:
            thread.shutdown()
