"""How often streams are written to: at every token while there is time for that, in intervals when there is not.

All streams are written to at the same moments, so that an interval costs the event loop one timer and one turn.
"""

from __future__ import annotations

WRITES_PER_S = 5000.0  # of all streams together: what one process can wake up and write for and still have time left
LONGEST_S = 0.05
WINDOW_S = 0.25


class Cadence:
    """Observes the tokens of all streams. Time is an argument, monotonic seconds."""

    def __init__(self) -> None:
        self._rate = 0.0  # tokens/s in the last whole window
        self._begin = 0.0
        self._count = 0

    def observe(self, num_tokens: int, now: float) -> None:
        """So many tokens came, in one report."""
        if now - self._begin >= WINDOW_S:
            whole = now - self._begin < 2 * WINDOW_S
            self._rate = self._count / (now - self._begin) if whole else 0.0
            self._begin, self._count = now, 0
        self._count += num_tokens

    def interval_s(self, num_streams: int) -> float:
        """From one moment of writing to the next, so that all together write WRITES_PER_S times a second at most."""
        return min(num_streams / WRITES_PER_S, LONGEST_S) if self._rate > WRITES_PER_S else 0.0
