"""What the ranks last said of themselves: how busy each was between two readings, and what memory it holds."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from tpqwen.step import RankStats


class RankLoad(msgspec.Struct, frozen=True):
    """One rank. All but the first two are None where they are not known; memory in bytes.

    memory_bytes: in use on its GPU by all processes, or what its tensors hold where there is no GPU to ask.
    """

    rank: int
    up: bool
    device: str | None = None
    busy_ratio: float | None = None  # share of the time since the last reading that its steps took, 0..1
    busy_seconds_total: float | None = None
    memory_bytes: int | None = None
    memory_total_bytes: int | None = None


class Readings:
    """Written every few seconds by whoever reads the ranks. Time is an argument, monotonic seconds."""

    def __init__(self) -> None:
        self._last: dict[int, tuple[float, float]] = {}  # rank -> when, and its busy seconds
        self._loads: list[RankLoad] = []

    def observe(self, ranks: Iterable[RankStats], tp: int, now: float) -> None:
        """What the ranks answered. One of 0..tp-1 that did not answer counts as down."""
        answers = {stats.rank: stats for stats in ranks}
        self._loads = [self._load(answers[r], now) if r in answers else RankLoad(r, False) for r in range(tp)]
        self._last = {rank: (now, stats.busy_s_total) for rank, stats in answers.items()}

    def latest(self) -> list[RankLoad]:
        """By rank; empty before the first reading."""
        return self._loads

    def _load(self, stats: RankStats, now: float) -> RankLoad:
        then, before = self._last.get(stats.rank, (now, stats.busy_s_total))
        ratio = None
        if now > then and stats.busy_s_total >= before:  # else it is a new process
            ratio = min((stats.busy_s_total - before) / (now - then), 1.0)
        total = stats.gpu.get("memory_total_bytes")
        return RankLoad(
            rank=stats.rank,
            up=True,
            device=stats.device,
            busy_ratio=ratio,
            busy_seconds_total=stats.busy_s_total,
            memory_bytes=int(stats.gpu.get("memory_used_bytes", stats.memory_allocated_bytes)) or None,  # 0: on a CPU
            memory_total_bytes=None if total is None else int(total),
        )
