"""Running sequences as arrays: per-slot counters, and cached row sets, so that a steady step is a few numpy calls."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tpqwen.scheduler.sequence import Sequence
from tpqwen.step import Ints

Longs = NDArray[np.int64]
Mask = NDArray[np.bool_]
END_ROWS = 4  # end ids of a slot that are compared in one numpy call; Qwen3 has 2, a request may add more


@dataclass(frozen=True, slots=True, eq=False)
class RowSet:
    """Rows of one step in order, with what `update` needs of each row laid out for bulk work."""

    slots: Longs
    sequences: list[Sequence]
    ids: list[str]
    appends: list[Callable[[int], None]]

    @staticmethod
    def of(sequences: list[Sequence]) -> RowSet:
        return RowSet(
            np.array([s.slot for s in sequences], np.int64),
            list(sequences),  # the caller goes on changing its own
            [s.request.id for s in sequences],
            [s.tokens.append for s in sequences],
        )

    def joined(self, other: RowSet) -> RowSet:
        """These rows, then the others."""
        return RowSet(
            np.concatenate((self.slots, other.slots)),
            self.sequences + other.sequences,
            self.ids + other.ids,
            self.appends + other.appends,
        )

    def picked(self, indexes: Longs) -> RowSet:
        """Only the rows at these indexes."""
        at = indexes.tolist()
        return RowSet(
            self.slots[indexes],
            [self.sequences[i] for i in at],
            [self.ids[i] for i in at],
            [self.appends[i] for i in at],
        )

    def __len__(self) -> int:
        return len(self.ids)


class Rows:
    """Counters of each slot. "Scheduled" includes steps in flight; an empty slot has 0 everywhere."""

    def __init__(self, num_slots: int, block_size: int) -> None:
        self.num_slots = num_slots
        self.block_size = block_size
        self.computed = np.zeros(num_slots, np.int64)  # positions scheduled to be in the cache
        self.capacity = np.zeros(num_slots, np.int64)  # positions that its blocks hold
        self.left = np.zeros(num_slots, np.int64)  # output tokens that may still be scheduled
        self.produced = np.zeros(num_slots, np.int64)  # output tokens known here
        self.generation = np.zeros(num_slots, np.int64)  # how often the slot changed hands
        self.sequences: list[Sequence | None] = [None] * num_slots
        self._max_output = np.zeros(num_slots, np.int64)
        self._min_tokens = np.zeros(num_slots, np.int64)
        self._ends: Ints = np.full((END_ROWS, num_slots), -1, np.int32)
        self._many_ends: dict[int, frozenset[int]] = {}  # slot -> end ids, where they are more than END_ROWS
        self._free = list(range(num_slots))  # a heap: low slots first

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def running(self) -> list[Sequence]:
        return [s for s in self.sequences if s is not None]

    def holder(self, slot: int) -> str:
        """The id of the request that a taken slot belongs to."""
        sequence = self.sequences[slot]
        assert sequence is not None
        return sequence.request.id

    def take(self, sequence: Sequence, computed: int) -> None:
        """Give the sequence a slot; `computed` positions are in its blocks already."""
        slot = heapq.heappop(self._free)
        sequence.slot = slot
        self.sequences[slot] = sequence
        self.computed[slot] = computed
        self.resize(sequence)
        self.produced[slot] = sequence.num_output
        self.left[slot] = sequence.max_output - sequence.num_output
        self._max_output[slot] = sequence.max_output
        self._min_tokens[slot] = sequence.request.min_tokens
        ends = sequence.request.end_ids
        self._ends[:, slot] = -1
        if len(ends) <= END_ROWS:
            self._ends[: len(ends), slot] = ends
        else:
            self._many_ends[slot] = frozenset(ends)

    def resize(self, sequence: Sequence) -> None:
        """Note how much the sequence's blocks hold now."""
        self.capacity[sequence.slot] = len(sequence.blocks) * self.block_size

    def release(self, sequence: Sequence) -> None:
        """Take the slot back. Rows of steps in flight no longer match its generation."""
        slot = sequence.slot
        self.generation[slot] += 1
        for counter in (self.computed, self.capacity, self.left, self.produced):
            counter[slot] = 0
        self._many_ends.pop(slot, None)
        self.sequences[slot] = None
        sequence.slot = -1
        heapq.heappush(self._free, slot)

    def ended(self, slots: Longs, tokens: Ints, index: Longs) -> tuple[Mask, Mask]:
        """Whether each row's token at output position `index` is an end token, and whether it is the last allowed."""
        stop = (self._ends[:, slots] == tokens).any(0)
        if self._many_ends:
            for i, (slot, token) in enumerate(zip(slots.tolist(), tokens.tolist(), strict=True)):
                stop[i] |= token in self._many_ends.get(slot, ())
        stop &= index >= self._min_tokens[slots]
        return stop, index + 1 >= self._max_output[slots]

    def growth(self, horizon: int) -> int:
        """Blocks that all running sequences together still take if each makes `horizon` more tokens or ends before."""
        reach = np.maximum(self.computed, self.capacity - self.block_size) + np.minimum(self.left, horizon)
        return int(np.maximum(-((self.capacity - reach) // self.block_size), 0).sum())
