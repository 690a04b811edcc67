"""How many prompt tokens a step may take on beside running streams, so that a long prompt hardly slows them down."""

from __future__ import annotations

from tpqwen.step import StepStats

STALL = 1.5  # what prompt tokens may add to a step, in decode steps; with the decode rows' own part 2.5 in all
LEAST = 256  # tokens: below it a step is mostly overhead, and the prompt would never get done
NEWEST = 0.2  # weight of the newest measurement


class Pace:
    """Learns the duration of a decode step and the cost of a prompt token from the steps that ran."""

    def __init__(self) -> None:
        self._decode_s: float | None = None
        self._s_per_token: float | None = None

    @property
    def limit(self) -> int | None:
        """Prompt tokens of a step that also decodes; None until both have been measured."""
        if self._decode_s is None or not self._s_per_token:
            return None
        return max(LEAST, int(STALL * self._decode_s / self._s_per_token))

    def observe(self, stats: StepStats) -> None:
        """Learn from one step."""
        if stats.phase == "decode":
            self._decode_s = _mean(self._decode_s, stats.duration_s)
        elif stats.prompt_tokens >= LEAST:
            own = self._decode_s if stats.phase == "mixed" and self._decode_s is not None else 0.0
            self._s_per_token = _mean(self._s_per_token, max(0.0, stats.duration_s - own) / stats.prompt_tokens)


def _mean(old: float | None, new: float) -> float:
    return new if old is None else (1 - NEWEST) * old + NEWEST * new
