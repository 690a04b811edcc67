"""When a step speculates, and which of the tokens that it brings count. Pure.

A speculative step costs more than an ordinary one and gives each row between one token and `count` + 1. Both prices and
the yield are learned from the steps that ran, so there is nothing to tune. Ranks draft and check by themselves
(kernels/draft_reference.py); here a step in flight counts as if all its drafts were right, until its result is there.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Tokens

import numpy as np

from tpqwen.request import Delta
from tpqwen.scheduler.flight import Flight, Tally
from tpqwen.scheduler.rows import Rows
from tpqwen.scheduler.sequence import Sequence
from tpqwen.step import DRAFT_ROWS, Ints, StepInput, StepStats, row_bucket

NEWEST = 0.2  # weight of the newest measurement
OUTLIER = 4.0  # a duration counts for at most so many times what was known: a step may have compiled a kernel
PROBE_COST = 0.01  # of the time: what trying it may cost while it does not pay
LEAST_PAUSE = 16  # steps between two such trials
REFRESH = 256  # speculative steps after which an ordinary one is measured again


class Speculation:
    """Decides step by step. count: tokens drafted for a row."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._yield = 1 + count / 2  # tokens of a row in a speculative step; hopeful, so that it is tried at first
        self._ordinary_s: dict[int, float] = {}  # by row_bucket
        self._speculative_s: dict[int, float] = {}
        self._since_trial = 0  # ordinary steps
        self._since_ordinary = 0  # speculative steps

    def fits(self, num_rows: int, max_tokens: int) -> bool:
        """Whether a step of so many decode rows may speculate at all. max_tokens: of a step."""
        return 0 < num_rows <= min(DRAFT_ROWS, max_tokens // (self.count + 1))

    def wanted(self, num_rows: int) -> bool:
        """Whether the next step of so many decode rows speculates. Ask once for each step that fits."""
        chosen = self._pays(row_bucket(num_rows))
        self._since_trial = 0 if chosen else self._since_trial + 1
        self._since_ordinary = self._since_ordinary + 1 if chosen else 0
        return chosen

    def observe(self, step: StepInput, stats: StepStats) -> None:
        """Learn from a step and what was seen of it. Steps with prompts say nothing here."""
        if step.chunks:
            return
        known = self._speculative_s if step.speculate else self._ordinary_s
        bucket = row_bucket(stats.num_tokens // (1 + step.speculate))
        old, new = known.get(bucket), stats.duration_s
        if step.speculate and old is None:
            new = min(new, OUTLIER * self._ordinary_s.get(bucket, new))
        if old is None or old > OUTLIER * new:  # a first one that stood still for long would keep all others away
            known[bucket] = new
        else:
            known[bucket] = (1 - NEWEST) * old + NEWEST * min(new, OUTLIER * old)
        if stats.num_drafts:
            mean = 1 + stats.accepted_tokens / stats.num_drafts
            self._yield = (1 - NEWEST) * self._yield + NEWEST * mean

    def _pays(self, bucket: int) -> bool:
        ordinary_s, speculative_s = self._ordinary_s.get(bucket), self._speculative_s.get(bucket)
        if ordinary_s is None or self._since_ordinary >= REFRESH:
            return False
        if speculative_s is None or self._yield * ordinary_s > speculative_s:
            return True
        return self._since_trial >= max(LEAST_PAUSE, (speculative_s / ordinary_s - 1) / PROBE_COST)


def take_accepted(
    rows: Rows, flight: Flight, tokens: Ints, counts: Ints, tally: Tally
) -> Iterator[tuple[Sequence, Delta, bool]]:
    """The result of a speculative step, row by row for those that still live: its tokens are appended as far as they
    count. Yields the delta, stop_id in it, and whether it ends the sequence."""
    live = rows.live(flight.rows)
    mine, counts_R, ends = flight.rows.picked(live), counts[live].astype(np.int64), np.cumsum(counts)[live]
    rows.settle(mine, 1 + flight.speculate - counts_R)
    tally.num_drafts += len(mine)
    tally.draft_tokens += len(mine) * flight.speculate
    tally.accepted_tokens += int(counts_R.sum()) - len(mine)
    for sequence, end, count in zip(mine.sequences, ends.tolist(), counts_R.tolist(), strict=True):
        new, index = tokens[end - count : end], int(rows.produced[sequence.slot])
        kept, stop_id, ended = _count_kept(sequence, index, new.tolist())
        rows.extend(sequence, new[:kept])
        tally.output_tokens += kept
        token_ids = new[:kept].tolist()
        yield sequence, Delta(id=sequence.request.id, index=index, token_ids=token_ids, stop_id=stop_id), ended


def _count_kept(sequence: Sequence, index: int, tokens: Tokens[int]) -> tuple[int, int | None, bool]:
    """How many of a row's tokens, the first at output index `index`, count: up to the first that ends the sequence or
    uses up its thinking budget. Then the end token, if one ended it, and whether it has ended."""
    ends, first_end = sequence.request.end_ids, sequence.request.min_tokens
    for i, token in enumerate(tokens):
        if sequence.watch is not None:
            sequence.watch.take(token)
        if token in ends and index + i >= first_end:
            return i + 1, token, True
        if index + i + 1 >= sequence.max_output:
            return i + 1, None, True
        if sequence.watch is not None and sequence.watch.due:
            return i + 1, None, False
    return len(tokens), None, False
