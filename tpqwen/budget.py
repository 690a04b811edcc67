"""How often something may be tried again before it counts as broken."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

REPAIRS = 5  # attempts at replacing ranks or the engine process, per window
ENGINES = 3  # of these, new engine processes


@dataclass
class Budget:
    """At most `most` events in any `window_s` seconds."""

    most: int
    window_s: float = 600.0
    _times: deque[float] = field(default_factory=deque)

    def take(self, now: float) -> bool:
        """Count one more, if it may be."""
        while self._times and now - self._times[0] > self.window_s:
            self._times.popleft()
        if len(self._times) >= self.most:
            return False
        self._times.append(now)
        return True
