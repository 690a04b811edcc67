"""The way into slots and blocks, and out again: the waiting queue, prefix hits, and how much room an entry needs."""

from __future__ import annotations

from bisect import bisect_left, insort
from enum import Enum, auto

from tpqwen.cache.blocks import BlockPool
from tpqwen.cache.prefix import PrefixCache
from tpqwen.scheduler.rows import Rows
from tpqwen.scheduler.sequence import Sequence, State, by_order

LOOKAHEAD = 64  # waiting sequences that may be passed over in one step because they wait for a prefix


class Verdict(Enum):
    """entered: it has a slot and blocks. later: an older one is computing its prefix. full: no room, nor for others."""

    ENTERED = auto()
    LATER = auto()
    FULL = auto()


class Admission:
    """Within a priority the tenants' shares in turn, within a share first come, first served: Sequence.order.

    A preempted sequence keeps its place.
    """

    def __init__(self, pool: BlockPool, prefix: PrefixCache, rows: Rows) -> None:
        self.waiting: list[Sequence] = []  # by order
        self.waiting_tokens = 0
        self._cautious = False  # whether some sequence here may have to run alone
        self._pool = pool
        self._prefix = prefix
        self._rows = rows
        self._computing: dict[bytes, Sequence] = {}  # digests of full blocks that running sequences are filling
        self._refused: tuple[Sequence, int] | None = None  # who was refused, at which pool.changes

    def push(self, sequence: Sequence) -> None:
        """Put it in the queue at its place."""
        sequence.state = State.WAITING
        insort(self.waiting, sequence, key=by_order)
        self.waiting_tokens += sequence.num_tokens
        self._cautious |= sequence.runs_alone
        if self._refused and sequence.order < self._refused[0].order:
            self._refused = None

    def remove(self, sequence: Sequence) -> None:
        """Take it out of the queue."""
        del self.waiting[bisect_left(self.waiting, sequence.order, key=by_order)]
        self.waiting_tokens -= sequence.num_tokens
        if self._refused and self._refused[0] is sequence:
            self._refused = None

    def candidates(self) -> list[Sequence]:
        """Who may be tried now, in order. Nobody, while what refused the last one has not changed."""
        if not self.waiting or not self._rows.num_free:
            return []
        if self._refused and self._refused[1] == self._pool.changes:
            return []
        return self.waiting[: self._before_alone() if self._cautious else self._rows.num_free + LOOKAHEAD]

    def enter(self, sequence: Sequence) -> Verdict:
        """Give a waiting sequence a slot and all blocks for the tokens it has, sharing what the prefix cache knows."""
        size, target = self._rows.block_size, sequence.num_tokens
        if self._must_wait(sequence):
            return Verdict.LATER
        self._prefix.extend(sequence.digests, sequence.tokens, target // size, sequence.request.cache_salt)
        # the last token is always computed: somebody must produce its logits
        limit = 0 if sequence.wants_scores else (target - 1) // size
        matched = self._prefix.match(sequence.digests, limit)
        sequence.waits_for = self._computed_by_another(sequence, len(matched), limit)
        if self._must_wait(sequence):
            return Verdict.LATER
        need = -(-target // size) - len(matched)
        self._pool.claim(matched)
        if not self._rows.num_free or self._pool.num_available < need + self._headroom(sequence):
            self._pool.free(matched)
            self._refused = (sequence, self._pool.changes)
            return Verdict.FULL
        self.remove(sequence)
        sequence.state = State.RUNNING
        if sequence.wants_scores:
            sequence.prompt_scores.clear()  # it begins anew
        sequence.blocks = matched + self._pool.allocate(need)
        sequence.num_prefill = target
        sequence.num_registered = len(matched)
        sequence.num_chunked = len(matched) * size
        self._rows.take(sequence, sequence.num_chunked)
        for digest in sequence.digests[len(matched) : target // size]:
            self._computing.setdefault(digest, sequence)
        return Verdict.ENTERED

    def give(self, sequence: Sequence, count: int) -> list[int]:
        """More blocks for one that runs; as (slot, index in its table, block) flat."""
        edits = []
        for block in self._pool.allocate(count):
            edits += [sequence.slot, len(sequence.blocks), block]
            sequence.blocks.append(block)
        self._rows.resize(sequence)
        return edits

    def take_back(self, sequences: list[Sequence]) -> None:
        """Blocks given ahead, which no scheduled step touches."""
        for s in sequences:
            keep = int(self._rows.computed[s.slot]) // self._rows.block_size + 1 if s.slot >= 0 else 0
            if s.slot >= 0 and len(s.blocks) > keep:
                self._pool.free(s.blocks[keep:])
                del s.blocks[keep:]
                self._rows.resize(s)

    def settle(self, sequence: Sequence, num_chunked: int) -> None:
        """A chunk has been collected: its full blocks may be shared from now on."""
        sequence.num_chunked = num_chunked
        self._register(sequence, num_chunked // self._rows.block_size)

    def leave(self, sequence: Sequence, *, trusted: bool = True) -> None:
        """Give slot and blocks back; what is full and settled stays findable unless it is not `trusted`.

        Safe while steps in flight still write to the blocks: steps run in order on the device, a new owner's writes
        come in a later step, and findable blocks lie below `settled`, where steps in flight never write.
        """
        self._rows.write_back(sequence)
        if trusted:
            self._register(sequence, sequence.settled // self._rows.block_size)
        else:
            self._pool.forget(sequence.blocks)
        for digest in sequence.digests[sequence.num_registered :]:
            self._computed(digest, sequence)
        self._pool.free(sequence.blocks)
        sequence.blocks = []
        sequence.num_registered = 0
        self._rows.release(sequence)

    def _before_alone(self) -> int:
        """How many of the queue may enter while some sequence has to run alone.

        It enters when nobody runs, and those behind it wait until it has left.
        """
        running = self._rows.running
        if any(s.runs_alone for s in running):
            return 0
        first = next((i for i, s in enumerate(self.waiting) if s.runs_alone), None)
        if first is None:
            self._cautious = False
            return self._rows.num_free + LOOKAHEAD
        return first or int(not running)

    def _register(self, sequence: Sequence, num_blocks: int) -> None:
        self._prefix.extend(sequence.digests, sequence.tokens, num_blocks, sequence.request.cache_salt)
        for i in range(sequence.num_registered, min(num_blocks, len(sequence.digests))):
            self._pool.remember(sequence.blocks[i], sequence.digests[i])
            self._computed(sequence.digests[i], sequence)
            sequence.num_registered = i + 1

    def _computed(self, digest: bytes, sequence: Sequence) -> None:
        if self._computing.get(digest) is sequence:
            del self._computing[digest]
            self._refused = None

    def _must_wait(self, sequence: Sequence) -> bool:
        """Only for somebody ahead in the order, whose chunks are therefore scheduled first: nobody starves."""
        leader = self._computing.get(sequence.waits_for) if sequence.waits_for else None
        return leader is not None and leader.order < sequence.order

    def _computed_by_another(self, sequence: Sequence, start: int, limit: int) -> bytes | None:
        """The last digest of the unbroken run from block `start` on that is being computed now."""
        last = None
        for digest in sequence.digests[start:limit]:
            leader = self._computing.get(digest)
            if leader is None or leader.order > sequence.order:
                break
            last = digest
        return last

    def _headroom(self, sequence: Sequence) -> int:
        """Blocks that must stay available after an entry, so that it is not preempted at once.

        Everybody, the newcomer included, must be able to make `horizon` more tokens. It grows 4-fold with each
        preemption of the newcomer, which bounds how often one is preempted: log4(longest output / 2 blocks) + 1.
        A sequence that would run alone needs no headroom, so the queue always moves.
        """
        size = self._rows.block_size
        if self._rows.num_free == self._rows.num_slots:
            return 0
        horizon = (2 * size) << (2 * min(sequence.preemptions, 12))
        own = sequence.num_tokens + min(sequence.max_output - sequence.num_output, horizon)
        return self._rows.growth(horizon) - (-own // size) - (-(-sequence.num_tokens // size))
