"""Running sequences as arrays: counters and output of each slot, and cached row sets, so that a steady step is a few
numpy calls, however many rows it has."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from itertools import compress

import numpy as np
from numpy.typing import NDArray

from tpqwen.errors import EngineError
from tpqwen.scheduler.sequence import Sequence, State, by_order
from tpqwen.step import LONG_ROW, Ints

Longs = NDArray[np.int64]
Mask = NDArray[np.bool_]
AT_ONCE = 16  # rows that are given blocks ahead in one step
END_ROWS = 4  # end ids of a slot that are compared in one numpy call; Qwen3 has 2, a request may add more


@dataclass(frozen=True, slots=True, eq=False)
class RowSet:
    """R rows of one step in order, with what `update` needs of each row laid out for bulk work.

    generations: of the slots when they were put together; a slot that changed hands since has another.
    """

    slots: Longs
    generations: Longs
    sequences: list[Sequence]
    ids: list[str]
    ends: Ints  # [END_ROWS, R] end ids, -1 where there are fewer
    first_end: Longs  # output index from which on they count
    last: Longs  # output index of the last token allowed

    def joined(self, other: RowSet) -> RowSet:
        """These rows, then the others."""
        return RowSet(
            np.concatenate((self.slots, other.slots)),
            np.concatenate((self.generations, other.generations)),
            self.sequences + other.sequences,
            self.ids + other.ids,
            np.concatenate((self.ends, other.ends), axis=1),
            np.concatenate((self.first_end, other.first_end)),
            np.concatenate((self.last, other.last)),
        )

    def picked(self, mask: Mask) -> RowSet:
        """Only the rows where the mask is set."""
        flags = mask.tolist()
        return RowSet(
            self.slots[mask],
            self.generations[mask],
            list(compress(self.sequences, flags)),
            list(compress(self.ids, flags)),
            self.ends[:, mask],
            self.first_end[mask],
            self.last[mask],
        )

    def __len__(self) -> int:
        return len(self.ids)


_NONE = np.empty(0, np.int64)
NO_ROWS = RowSet(_NONE, _NONE, [], [], np.empty((END_ROWS, 0), np.int32), _NONE, _NONE)


class Rows:
    """Counters and output of each slot. "Scheduled" includes steps in flight; an empty slot has 0 in all counters.

    A speculative step in flight counts as if all its drafts were right: until then `computed` is what it may become at
    most and `left` at least, which may be below 0.

    longest: tokens that a sequence may have at most.
    """

    def __init__(self, num_slots: int, block_size: int, longest: int) -> None:
        self.num_slots = num_slots
        self.block_size = block_size
        self._low = block_size // 8  # positions left in a row's blocks, from which on it is about to need more
        self.computed = np.zeros(num_slots, np.int64)  # positions scheduled to be in the cache
        self.capacity = np.zeros(num_slots, np.int64)  # positions that its blocks hold
        self.left = np.zeros(num_slots, np.int64)  # output tokens that may still be scheduled
        self.produced = np.zeros(num_slots, np.int64)  # output tokens known here
        self.drafted = np.zeros(num_slots, np.int64)  # speculative steps in flight
        self._plain = np.zeros(num_slots, np.bool_)  # whether it may be in such a step
        self._longest = longest
        self.generation = np.zeros(num_slots, np.int64)  # how often the slot changed hands
        self.releases = 0  # how often any did
        self.long = False  # whether one of those last looked at has more than LONG_ROW positions in the cache
        # output tokens by slot and index, from the one on that the sequence had when it came; zeros take no memory
        self._output: Ints = np.zeros((num_slots, longest), np.int32)
        self.sequences: list[Sequence | None] = [None] * num_slots
        self._last = np.zeros(num_slots, np.int64)
        self._first_end = np.zeros(num_slots, np.int64)
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
        self._plain[slot] = sequence.row_params.can_speculate
        self._last[slot] = sequence.max_output - 1
        self._first_end[slot] = sequence.request.min_tokens
        ends = sequence.request.end_ids
        self._ends[:, slot] = -1
        if len(ends) <= END_ROWS:
            self._ends[: len(ends), slot] = ends
        else:
            self._many_ends[slot] = frozenset(ends)

    def row_set(self, sequences: list[Sequence]) -> RowSet:
        """Rows of these sequences, which all hold slots."""
        slots = np.array([s.slot for s in sequences], np.int64)
        return RowSet(
            slots,
            self.generation[slots],
            list(sequences),  # the caller goes on changing its own
            [s.request.id for s in sequences],
            self._ends[:, slots],
            self._first_end[slots],
            self._last[slots],
        )

    def resize(self, sequence: Sequence) -> None:
        """Note how much the sequence's blocks hold now."""
        self.capacity[sequence.slot] = len(sequence.blocks) * self.block_size

    def release(self, sequence: Sequence) -> None:
        """Take the slot back. Rows of steps in flight no longer match its generation."""
        slot = sequence.slot
        self.generation[slot] += 1
        self.releases += 1
        for counter in (self.computed, self.capacity, self.left, self.produced, self.drafted):
            counter[slot] = 0
        self._many_ends.pop(slot, None)
        self.sequences[slot] = None
        sequence.slot = -1
        heapq.heappush(self._free, slot)

    def append(self, rows: RowSet, tokens: Ints) -> Longs:
        """One more output token of each row. Returns their output indexes."""
        index = self.produced[rows.slots]
        self._output[rows.slots, index] = tokens
        self.produced[rows.slots] = index + 1
        return index

    def extend(self, sequence: Sequence, tokens: Ints) -> None:
        """More output tokens of one row."""
        slot, index = sequence.slot, int(self.produced[sequence.slot])
        self._output[slot, index : index + len(tokens)] = tokens
        self.produced[slot] = index + len(tokens)

    def schedule(self, rows: RowSet, speculate: int = 0) -> None:
        """A step in which these rows decode."""
        self.computed[rows.slots] += 1 + speculate
        self.left[rows.slots] -= 1 + speculate
        if speculate:
            self.drafted[rows.slots] += 1

    def settle(self, rows: RowSet, rejected: Longs) -> None:
        """A speculative step of these rows, which are live, has ended: so many of their drafts were wrong."""
        self.computed[rows.slots] -= rejected
        self.left[rows.slots] += rejected
        self.drafted[rows.slots] -= 1

    def missing_blocks(self, rows: RowSet, count: int) -> Longs | None:
        """How many blocks each row lacks for `count` positions more; None when one may not have so many, or must not
        be in a speculative step."""
        after = self.computed[rows.slots] + count
        if not self._plain[rows.slots].all() or after.max() > self._longest:
            return None
        missing: Longs = np.maximum(-((self.capacity[rows.slots] - after) // self.block_size), 0)
        return missing

    def write_back(self, sequence: Sequence) -> None:
        """Bring the sequence's own tokens up to date, which its slot's output runs ahead of."""
        known, slot = sequence.num_output, sequence.slot
        sequence.tokens.frombytes(self._output[slot, known : self.produced[slot]].tobytes())

    def up_to_date(self) -> list[Sequence]:
        """All that run, each with its own tokens up to date."""
        for sequence in self.running:
            self.write_back(sequence)
        return self.running

    def check(self, s: Sequence) -> None:
        """Raise EngineError unless a running sequence and its slot say the same. Writes nothing back."""
        slot, produced = s.slot, int(self.produced[s.slot])
        state = (s.state, len(s.blocks) * self.block_size, self.sequences[slot])
        if state != (State.RUNNING, self.capacity[slot], s) or s.num_output > produced:
            raise EngineError(f"request {s.request.id} in slot {slot} does not match its row")
        settled = s.num_chunked if s.num_chunked < s.num_prefill else s.num_prompt + produced - 1
        owed = self.left[slot] < 0 and not self.drafted[slot]
        if not settled <= self.computed[slot] <= self.capacity[slot] or owed:
            raise EngineError(f"request {s.request.id} has settled {settled}, computed {self.computed[slot]}")

    def live(self, rows: RowSet) -> Mask:
        """Which of the rows still hold their slots."""
        same: Mask = self.generation[rows.slots] == rows.generations
        return same

    def ended(self, rows: RowSet, tokens: Ints, index: Longs) -> tuple[Mask, Mask]:
        """Whether each row's token at output position `index` is an end token, and whether it is the last allowed."""
        stop = (rows.ends == tokens).any(0)
        if self._many_ends:
            for i, (slot, token) in enumerate(zip(rows.slots.tolist(), tokens.tolist(), strict=True)):
                stop[i] |= token in self._many_ends.get(slot, ())
        stop &= index >= rows.first_end
        return stop, index >= rows.last

    def quiet(self, rows: RowSet) -> int:
        """For how many steps none of these rows will make its last token, be needy or become long; -1 if one has made
        it. Whether one is long by now is in `long`."""
        computed = self.computed[rows.slots]
        longest = int(computed.max(initial=0))
        self.long = longest > LONG_ROW
        if not len(rows):
            return 0
        room = int((self.capacity[rows.slots] - computed).min()) - self._low
        if not self.long:
            room = min(room, LONG_ROW - longest)
        return min(int(self.left[rows.slots].min()) - 1, max(0, room))

    def needy(self, rows: RowSet, *, ahead: bool) -> list[Sequence]:
        """Those that are to get blocks now, in order: their next position has none.

        ahead: once one is about to need some, also others that will need some within a block, the nearest first and
        not many, so that there are long pauses between such steps and none of them takes long.
        """
        room = self.capacity[rows.slots] - self.computed[rows.slots]
        chosen = np.flatnonzero(room == 0)
        if ahead and len(room) and room.min() <= self._low:
            nearest = np.argsort(room, kind="stable")[: max(len(chosen), AT_ONCE)]
            chosen = nearest[room[nearest] < np.minimum(self.left[rows.slots[nearest]], self.block_size)]
        return sorted((rows.sequences[i] for i in chosen.tolist()), key=by_order)

    def growth(self, horizon: int) -> int:
        """Blocks that all running sequences together still take if each makes `horizon` more tokens or ends before."""
        reach = np.maximum(self.computed, self.capacity - self.block_size) + np.clip(self.left, 0, horizon)
        return int(np.maximum(-((self.capacity - reach) // self.block_size), 0).sum())
