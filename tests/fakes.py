"""FakeExecutor: a model of the ranks in plain Python that obeys StepInput to the letter and distrusts every word of it.

It keeps slots, block tables and KV contents of its own. A KV entry is the token at that position together with a chain
value over all tokens up to it, so a wrong, stale or overwritten block shows at its next use. The next token is a pure
function of the token history, the parameters and the output index: whatever the scheduler does, outputs must equal
`expected_tokens`.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from zlib import crc32

import msgspec

from tpqwen.errors import RankDied
from tpqwen.request import GenerateRequest, TokenLogprob
from tpqwen.scheduler.sequence import row_params
from tpqwen.step import (
    DRAFT_ROWS,
    LONG_ROW,
    Admit,
    Capacity,
    Chunk,
    RankStats,
    RowParams,
    StepInput,
    StepOutput,
    decode_input,
    decode_output,
    encode,
    ints,
    packed,
)

VOCABULARY = 1000
NextToken = Callable[[Sequence[int], RowParams, int], int]


def tiny_capacity(**changes: int) -> Capacity:
    """Small sizes that make chunking, preemption and eviction frequent."""
    sizes = {"num_blocks": 33, "block_size": 4, "max_num_seqs": 8, "max_model_len": 96, "max_batched_tokens": 16}
    return msgspec.convert(sizes | changes, Capacity)


def hashed_token(history: Sequence[int], params: RowParams, out_index: int) -> int:
    """A token below VOCABULARY that depends on all of the history, on seed and choice; never a forbidden end."""
    state = crc32(array("q", [params.seed % 2**31, params.choice, out_index, *history]).tobytes())
    token = state % VOCABULARY
    while out_index < params.min_tokens and token in params.end_ids:
        token = (token + 1) % VOCABULARY
    return token


def expected_tokens(request: GenerateRequest, max_tokens: int, next_token: NextToken = hashed_token) -> list[int]:
    """All output tokens that the request must have at its end, those it brought along included."""
    history, params = [*request.prompt_ids, *request.output_ids], row_params(request)
    start = len(request.prompt_ids)
    while len(history) - start < max_tokens:
        index = len(history) - start
        history.append(next_token(history, params, index))
        if history[-1] in request.end_ids and index >= request.params.min_tokens:
            break
    return history[start:]


@dataclass
class Block:
    """owner: the residency (one stay of a sequence in a slot) that writes it. entries: (token, chain) by offset."""

    owner: int = -1
    version: int = 0
    entries: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class Slot:
    """What a rank keeps. history: tokens whose KV is in the cache, plus the last sampled one if `pending`."""

    residency: int
    admit: Admit
    out_index: int
    table: dict[int, int] = field(default_factory=dict)
    length: int = 0
    history: list[int] = field(default_factory=list)
    adopted: int = 0  # positions that others had filled
    pending: bool = False  # the last token of history was sampled, its KV is still to be written
    seen: list[tuple[int, int]] = field(default_factory=list)  # (block, version) of the table, checked at each use


class FakeExecutor:
    """Implements executor.protocol.Executor. Steps run when submitted; `faults` maps a number of collects to what that
    collect raises; `is_bad` picks rows that report NaN."""

    def __init__(
        self,
        capacity: Capacity | None = None,
        *,
        depth: int = 2,
        epoch: int = 0,
        next_token: NextToken = hashed_token,
        is_bad: Callable[[Sequence[int], RowParams], bool] = lambda history, params: False,
        faults: dict[int, Exception] | None = None,
    ) -> None:
        self.capacity = capacity or tiny_capacity()
        self.depth = depth
        self.next_token = next_token
        self.is_bad = is_bad
        self.faults = faults or {}
        self.num_collected = 0
        self.stopped = False
        self.timeouts: list[float] = []
        self.steps: list[StepInput] = []
        self._residencies = 0
        self.restart(epoch)

    def start(self) -> Capacity:
        return self.capacity

    def stop(self) -> None:
        self.stopped = True

    def repair(self, error: RankDied) -> Capacity:
        self.restart(self.epoch + 1)
        return self.capacity

    def stats(self) -> list[RankStats]:
        return []

    def restart(self, epoch: int) -> None:
        """New ranks: no slot, no KV, no step in flight."""
        self.epoch = epoch
        self.slots: dict[int, Slot] = {}
        self.blocks = [Block() for _ in range(self.capacity.num_blocks)]
        self.decode: list[int] = []
        self.outputs: deque[bytes] = deque()
        self._next_step = 0
        self.graphs_left = self.capacity.graphs_ahead

    def submit(self, step: StepInput) -> None:
        assert len(self.outputs) < self.depth, "more steps in flight than agreed"
        step = decode_input(encode(step))
        self.steps.append(step)
        self.outputs.append(encode(self._run(step)))

    def collect(self, timeout_s: float) -> StepOutput:
        self.num_collected += 1
        self.timeouts.append(timeout_s)
        if fault := self.faults.pop(self.num_collected, None):
            raise fault
        return decode_output(self.outputs.popleft())

    def ready(self) -> bool:
        return False

    def _run(self, step: StepInput) -> StepOutput:
        assert (step.epoch, step.step) == (self.epoch, self._next_step)
        self._next_step += 1
        for admit in step.admits:
            self._admit(admit)
        for slot, index, block in ints(step.blocks, -1, 3).tolist():
            assert 0 < block < self.capacity.num_blocks, "the null block or no block at all"
            assert 0 <= index < -(-self.capacity.max_model_len // self.capacity.block_size), "outside of the table"
            held = self.slots[slot]
            assert index * self.capacity.block_size >= held.length, "a block in use was replaced"
            held.table[index] = block
        assert step.decode is not None or self._next_step > 1, "None in the first step of an epoch"
        self.decode = self.decode if step.decode is None else ints(step.decode).tolist()
        used = [*self.decode, *(c.slot for c in step.chunks)]
        assert used or self.graphs_left, "an empty step, and no graph to be captured in it"
        self.graphs_left -= not used
        assert len(set(used)) == len(used), "a slot is twice in a step"
        size = len(self.decode) * (1 + step.speculate) + step.num_chunk_tokens
        assert size <= self.capacity.max_batched_tokens, "over the budget"
        if step.speculate:
            assert not step.chunks and len(self.decode) <= DRAFT_ROWS, "a speculative step has a few decode rows alone"
            return self._speculate(step)
        # as on a device, all of a step's KV is written before anything is read back
        for slot in self.decode:
            self._decode(self.slots[slot])
        longest = max((self.slots[slot].length for slot in self.decode), default=0)
        hoped = sum(s.speculate for s in self.steps[-1 - self.depth :])  # drafts in flight may all have been right
        said = "a row that decodes is long, and the step does not say so, or the other way round"
        assert step.wide >= (longest > LONG_ROW) and step.wide <= (longest + hoped > LONG_ROW), said
        for chunk in step.chunks:
            self._chunk(self.slots[chunk.slot], chunk)
        for slot in used:
            self._verify(self.slots[slot])
        return self._sample(step, [*self.decode, *(c.slot for c in step.chunks if c.sample)])

    def _admit(self, admit: Admit) -> None:
        assert 0 <= admit.slot < self.capacity.max_num_seqs
        self._residencies += 1
        self.slots[admit.slot] = Slot(self._residencies, admit, admit.out_index)

    def _decode(self, slot: Slot) -> None:
        assert slot.pending, "decodes without a sampled token"
        self._write(slot, slot.length, slot.history[-1])
        slot.pending = False

    def _speculate(self, step: StepInput) -> StepOutput:
        """Each row gets some number of its next tokens, the KV of those before the last, and rubbish behind it."""
        tokens: list[int] = []
        counts, bad = [], []
        for row, slot in enumerate(self.slots[s] for s in self.decode):
            params, start = slot.admit.params, slot.length
            assert params.can_speculate, "the host has a say in this row's tokens"
            known = ints(slot.admit.cached).tolist()
            assert len(known) == slot.adopted and known == slot.history[: slot.adopted], "unknown tokens of a prefix"
            count = 1 + crc32(array("q", slot.history).tobytes()) % (1 + step.speculate)
            for i in range(count):
                self._decode(slot)
                tokens.append(self._pick(slot))
                if self.is_bad(slot.history[:-1], params):
                    bad.append(row)
                    count = i + 1
                    break
            counts.append(count)
            for position in range(start + count, start + 1 + step.speculate):
                self._spoil(slot, position)
        for row in self.decode:
            self._verify(self.slots[row])
        return StepOutput(step.epoch, step.step, packed(tokens), bad_rows=tuple(bad), counts=packed(counts))

    def _pick(self, slot: Slot) -> int:
        """Sample the row's next token."""
        slot.history.append(self.next_token(slot.history, slot.admit.params, slot.out_index))
        slot.out_index += 1
        slot.pending = True
        return slot.history[-1]

    def _spoil(self, slot: Slot, position: int) -> None:
        """Write the KV of a token that was not right; whose block that is, shows where it does harm."""
        index, offset = divmod(position, self.capacity.block_size)
        assert index in slot.table, "no block for a drafted position"
        block = self.blocks[slot.table[index]]
        if offset == 0:
            block.owner, block.entries, block.version = slot.residency, [], block.version + 1
        assert block.owner == slot.residency and len(block.entries) <= offset, "a draft spoils what is in use"

    def _chunk(self, slot: Slot, chunk: Chunk) -> None:
        tokens = ints(chunk.token_ids).tolist()
        assert tokens and not slot.pending, "an empty chunk, or a chunk of a sequence that decodes"
        if slot.length == 0 and chunk.start:
            self._adopt(slot, chunk.start)
        assert chunk.start == slot.length, "the chunk does not begin where the slot's cache ends"
        for token in tokens:
            slot.history.append(token)
            self._write(slot, slot.length, token)
        if slot.admit.params.needs_history:
            known = ints(slot.admit.history).tolist()
            assert slot.history == known[: len(slot.history)], "chunks and history disagree"
            assert not chunk.sample or len(slot.history) == len(known)
            assert len(known) - slot.admit.num_prompt == slot.admit.out_index

    def _adopt(self, slot: Slot, length: int) -> None:
        """A prefix hit: the first `length` positions are in blocks that others have filled."""
        size, chain = self.capacity.block_size, 0
        assert length % size == 0, "a block that is not full was shared"
        for index in range(length // size):
            block = self.blocks[slot.table[index]]
            assert len(block.entries) == size, "a shared block was not full"
            assert block.owner != slot.residency
            for token, value in block.entries:
                chain = hash((chain, token))
                assert value == chain, "a shared block follows other tokens than these"
                slot.history.append(token)
            slot.seen.append((slot.table[index], block.version))
        slot.length = slot.adopted = length

    def _write(self, slot: Slot, position: int, token: int) -> None:
        index, offset = divmod(position, self.capacity.block_size)
        assert index in slot.table, "no block for this position"
        block = self.blocks[slot.table[index]]
        if offset == 0:
            block.owner, block.entries, block.version = slot.residency, [], block.version + 1
            slot.seen.append((slot.table[index], block.version))
        assert block.owner == slot.residency, "wrote into a block of another sequence"
        assert len(block.entries) == offset, "wrote over a cached position"
        block.entries.append((token, hash((self._chain(slot, position), token))))
        slot.length = position + 1

    def _chain(self, slot: Slot, length: int) -> int:
        """Chain value over the first `length` positions, as the cache has it."""
        if not length:
            return 0
        index, offset = divmod(length - 1, self.capacity.block_size)
        return self.blocks[slot.table[index]].entries[offset][1]

    def _verify(self, slot: Slot) -> None:
        """Every block in use is still the one that was filled or adopted."""
        table = [slot.table[i] for i in range(-(-slot.length // self.capacity.block_size))]
        assert [(b, self.blocks[b].version) for b in table] == slot.seen, "a block in use was given to another sequence"
        assert len(slot.history) == slot.length + slot.pending

    def _sample(self, step: StepInput, rows: list[int]) -> StepOutput:
        tokens, bad, logprobs = [], [], []
        for i, slot in enumerate(self.slots[r] for r in rows):
            params = slot.admit.params
            if self.is_bad(slot.history, params):
                bad.append(i)
            tokens.append(self._pick(slot))
            if params.logprobs >= 0:
                logprobs.append((i, TokenLogprob(-0.5, [tokens[i]], [-0.5])))
        return StepOutput(
            epoch=step.epoch,
            step=step.step,
            tokens=packed(tokens) if tokens else b"",
            bad_rows=tuple(bad),
            logprobs=tuple(logprobs),
            graphs_left=0 if rows or step.chunks else self.graphs_left,
            prompt_logprobs=tuple((i, self._scores(c)) for i, c in enumerate(step.chunks) if c.targets),
            pooled=tuple(
                (i, packed(self.slots[r].history[:-1]))
                for i, r in enumerate(rows)
                if self.slots[r].admit.params.pooling is not None
            ),
        )

    def _scores(self, chunk: Chunk) -> list[TokenLogprob]:
        """A score names its target and the position it was made at."""
        assert self.slots[chunk.slot].admit.params.prompt_logprobs >= 0
        return [TokenLogprob(-float(t), [chunk.start + i], [-1.0]) for i, t in enumerate(ints(chunk.targets).tolist())]
