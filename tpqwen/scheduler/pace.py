"""How much prompt a step may take on beside running streams, so that a long prompt hardly slows them down.

Work is counted in tokens; a token that sees a long context counts for more, by Capacity.context_cost. Pure.
"""

from __future__ import annotations

import math

from tpqwen.step import StepInput, StepStats

STALL = 1.5  # what prompts may add to a step, in decode steps; with the decode rows' own part 2.5 in all
LEAST = 128  # tokens: below it a step is mostly overhead, and the prompt would never get done
OUTNUMBER = 4  # streams per waiting prompt from which their pace comes first
NEWEST = 0.2  # weight of the newest measurement


def work_of(start: int, num_tokens: int, context_cost: float) -> float:
    """Work of the tokens at positions start .. start + num_tokens of a sequence."""
    return num_tokens * (1.0 + context_cost * (start + num_tokens / 2))


def tokens_within(work: float, start: int, context_cost: float) -> int:
    """How many tokens from position `start` on are about that much work; at least LEAST."""
    first = 1.0 + context_cost * start
    return max(LEAST, int(2 * work / (first + math.sqrt(first * first + 2 * context_cost * work))))


class Pace:
    """Learns the duration of a decode step and the cost of a prompt's work from the steps that ran."""

    def __init__(self, context_cost: float) -> None:
        self._context_cost = context_cost
        self._decode_s: float | None = None
        self._s_per_work: float | None = None

    @property
    def limit(self) -> float | None:
        """Work of a step that also decodes; None until both have been measured."""
        if self._decode_s is None or not self._s_per_work:
            return None
        return STALL * self._decode_s / self._s_per_work

    def observe(self, step: StepInput, stats: StepStats) -> None:
        """Learn from a step and what was seen of it."""
        if stats.phase == "decode":
            self._decode_s = _mean(self._decode_s, stats.duration_s)
        elif stats.prompt_tokens >= LEAST:
            own = self._decode_s if stats.phase == "mixed" and self._decode_s is not None else 0.0
            work = sum(work_of(c.start, c.num_tokens, self._context_cost) for c in step.chunks)
            self._s_per_work = _mean(self._s_per_work, max(0.0, stats.duration_s - own) / work)


def _mean(old: float | None, new: float) -> float:
    return new if old is None else (1 - NEWEST) * old + NEWEST * new
