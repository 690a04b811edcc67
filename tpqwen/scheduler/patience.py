"""How long a request may wait for its first step. Time is an argument."""

from __future__ import annotations

from collections import deque

from tpqwen.scheduler.sequence import Sequence, State


class Patience:
    """Knows who came when; looks at the oldest only, so that a step costs nothing. timeout_s 0: for ever."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._oldest: deque[Sequence] = deque()

    def watch(self, sequence: Sequence) -> None:
        """A new request; those that bring tokens along have been served before and are not given up."""
        if self.timeout_s and not sequence.num_output:
            self._oldest.append(sequence)

    def lost(self, now: float) -> list[Sequence]:
        """Who has waited too long, never having run."""
        lost = []
        while self._oldest and self._over(self._oldest[0], now):
            sequence = self._oldest.popleft()
            if sequence.state is State.WAITING and sequence.queue_s is None:
                lost.append(sequence)
        return lost

    def _over(self, sequence: Sequence, now: float) -> bool:
        served = sequence.queue_s is not None or sequence.state is State.FINISHED
        return served or now - sequence.arrived_at > self.timeout_s
