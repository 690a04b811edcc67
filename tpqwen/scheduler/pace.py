"""How much prompt a step may take on beside running streams, so that a long prompt hardly slows them down.

Work is counted in tokens; a token that sees a long context counts for more, by Capacity.context_cost. Pure.
"""

from __future__ import annotations

import math

from tpqwen.step import Capacity, StepInput, StepStats, token_bucket

STALL = 1.2  # what prompts may add to a step, in decode steps; with the decode rows' own part 2.2 in all
LEAST = 128  # tokens: below it a step is mostly overhead, and the prompt would never get done
OUTNUMBER = 4  # streams per waiting prompt from which their pace comes first
NEWEST = 0.2  # weight of the newest measurement
FRESH = 32  # steps with prompts for which the time of a decode step holds, while about as many rows decode
OUTLIER = 4.0  # a measurement counts for at most so many times what was known: a step may have compiled a kernel
FILLING = 0.25  # of a gentle step's work: what tokens that fill a graph up may add by looking at their context
SCRAP = 1 / 16  # of a step's tokens
SHORT = 1 / 3  # of what computes as long as launching takes: a longer prompt gains more by attending to all at once


def work_of(start: int, num_tokens: int, context_cost: float) -> float:
    """Work of the tokens at positions start .. start + num_tokens of a sequence."""
    return num_tokens * (1.0 + context_cost * (start + num_tokens / 2))


def tokens_within(work: float, start: int, context_cost: float) -> int:
    """How many tokens from position `start` on are about that much work; at least LEAST."""
    first = 1.0 + context_cost * start
    return max(LEAST, int(2 * work / (first + math.sqrt(first * first + 2 * context_cost * work))))


class Room:
    """How much prompt one step may still take on.

    budget: tokens. gentle: work beside running streams, as Pace.limit; None: the budget alone counts. A gentle step is
    one that has a graph (a larger one is launched kernel by kernel, for which the streams would wait), and the
    matrices of what fills the graph up are computed anyway. So is a step that begins with a short prompt, where
    launching takes longer than computing: a crowd's prompts are done sooner in several graphs.
    crowd: tokens of prompts that may as well be computed all at once, because nobody waits for the first of them.
    """

    def __init__(self, budget: int, gentle: float | None, capacity: Capacity, crowd: int = 0) -> None:
        self._left = budget
        self._gentle = gentle
        self._capacity = capacity
        self._tokens = 0  # taken
        self._chunks = 0
        self._graphed = False
        self._prefers_graphs = capacity.launch_tokens > max(capacity.graph_tokens, crowd)
        if gentle is not None and capacity.graph_tokens:
            self._be_graphed()

    @property
    def is_full(self) -> bool:
        """Whether no chunk is to be added. Behind others none is begun for less than LEAST work; the first one may."""
        if self._left <= 0 or (self._graphed and 0 < self._capacity.graph_chunks <= self._chunks):
            return True
        return self._gentle is not None and (self._gentle < LEAST if self._chunks else self._gentle <= 0)

    def is_scrap(self, num_tokens: int) -> bool:
        """Whether what is left is too little to begin a prompt with: computed at once it is cheaper."""
        if self._graphed and self._gentle is None:
            return self._left < min(num_tokens, LEAST) or num_tokens >= self._capacity.graph_tokens
        return self._chunks > 0 and self._left < min(num_tokens, SCRAP * self._capacity.max_batched_tokens)

    def tokens(self, start: int, missing: int) -> int:
        """Of the next chunk at most, which begins at position `start` of a sequence that lacks so many."""
        short = max(self._capacity.graph_tokens, SHORT * self._capacity.launch_tokens)
        if missing < short and self._prefers_graphs and not self._chunks and not self._graphed:
            self._be_graphed()
        if self._gentle is None:
            return self._left
        cost = self._capacity.context_cost
        most = tokens_within(self._gentle, start, cost)
        spare = token_bucket(self._tokens + most, self._chunks + 1) - self._tokens - most if self._graphed else 0
        fills = spare > 0 and spare * cost * start <= FILLING * self._gentle
        return min(self._left, most + spare if fills else most)

    def _be_graphed(self) -> None:
        self._graphed = True
        self._left = min(self._left, self._capacity.graph_tokens)

    def take(self, start: int, num_tokens: int) -> None:
        """A chunk has been added."""
        self._left -= num_tokens
        self._tokens += num_tokens
        self._chunks += 1
        if self._gentle is not None:
            self._gentle -= work_of(start, num_tokens, self._capacity.context_cost)


class Pace:
    """Learns the duration of a decode step and the cost of a prompt's work from the steps that ran."""

    def __init__(self, context_cost: float) -> None:
        self._context_cost = context_cost
        self._decode_s: float | None = None
        self._s_per_work: float | None = None
        self._mixed = False
        self._rows = 0  # of the decode step measured last
        self._age = 0  # steps with prompts since then

    @property
    def limit(self) -> float | None:
        """Work of a step that also decodes; None until both have been measured.

        0 when the last decode step without prompts was too long ago or had other rows: then one is wanted, to measure.
        """
        if self._decode_s is None or not self._s_per_work:
            return None
        return 0.0 if self._age >= FRESH else STALL * self._decode_s / self._s_per_work

    def observe(self, step: StepInput, stats: StepStats) -> None:
        """Learn from a step and what was seen of it.

        Steps with prompts alone are larger and dearer or cheaper by the token: they count until a mixed one was seen.
        """
        rows = stats.num_tokens - stats.prompt_tokens
        alike = abs(rows - self._rows) <= self._rows // 4
        if stats.phase == "decode":
            self._decode_s = _mean(self._decode_s if alike else None, stats.duration_s)
            self._rows, self._age = rows, 0
            return
        mixed = stats.phase == "mixed" and self._decode_s is not None
        if mixed:
            self._age = self._age + 1 if alike else FRESH
        if stats.prompt_tokens < LEAST or (self._mixed and not mixed):
            return
        own = (self._decode_s or 0.0) if mixed else 0.0
        work = sum(work_of(c.start, c.num_tokens, self._context_cost) for c in step.chunks)
        self._s_per_work = _mean(self._s_per_work, max(0.0, stats.duration_s - own) / work)
        self._mixed |= mixed


def _mean(old: float | None, new: float) -> float:
    return new if not old else (1 - NEWEST) * old + NEWEST * min(new, OUTLIER * old)
