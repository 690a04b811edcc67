"""StepInput -> device tensors of one pass, with at most one host-to-device copy.

T tokens, B decode rows, C chunks, R sampled rows. All integers of a step go into one pinned buffer. Buffers rotate so
that a step may be packed while earlier ones still have to run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from tpqwen.kernels import ops
from tpqwen.kernels.context import PrefillRows
from tpqwen.step import Chunk, Ints, StepInput, ints, packed
from tpqwen.worker.slots import SlotState, admit_row


@dataclass(frozen=True)
class ScoredChunk:
    """A chunk whose prompt log-probabilities are wanted. first: its first token among the prefill tokens."""

    index: int  # among the step's chunks
    first: int
    num_targets: int
    wanted: int  # how many of the likeliest


@dataclass(frozen=True)
class ChunkBatch:
    """The prefill part of a step on the device."""

    ids: torch.Tensor  # int32 [T]
    positions: torch.Tensor  # int32 [T]
    cache_slots: torch.Tensor  # int64 [T]
    slots_C: torch.Tensor  # int64
    rows: PrefillRows
    sampled: torch.Tensor  # int64, index of each sampling chunk's last token among the prefill tokens
    sampled_slots: torch.Tensor  # int32
    token_slots: torch.Tensor  # int64 [T]
    targets: torch.Tensor | None = None  # int32, of all chunks that carry some, one after another
    scored: tuple[ScoredChunk, ...] = ()


class Stager:
    """Packs the integers of one step; `depth` buffers rotate."""

    def __init__(self, device: torch.device, depth: int) -> None:
        self._cuda = device.type == "cuda"
        self._device = device
        self._pinned: list[torch.Tensor | None] = [None] * depth
        self._turn = 0

    def pack(self, parts: Sequence[Ints]) -> list[torch.Tensor]:
        """Each part (int32, any shape) as a host tensor, one after another in one buffer; pinned for a GPU."""
        views = torch.split(self.flat(parts), [p.size for p in parts])
        return [v.view(p.shape) for v, p in zip(views, parts, strict=True)]

    def send(self, parts: Sequence[Ints]) -> list[torch.Tensor]:
        """Each part on the device, all through one copy."""
        moved = torch.split(self.flat(parts).to(self._device, non_blocking=True), [p.size for p in parts])
        return [m.view(p.shape) for m, p in zip(moved, parts, strict=True)]

    def flat(self, parts: Sequence[Ints]) -> torch.Tensor:
        """All parts in one host tensor of one dimension, pinned for a GPU."""
        total = sum(p.size for p in parts)
        buffer = self._buffer(total)[:total]
        if total:
            np.concatenate([p.reshape(-1) for p in parts], out=buffer.numpy())
        return buffer

    def _buffer(self, total: int) -> torch.Tensor:
        if not self._cuda:
            return torch.empty(total, dtype=torch.int32)
        self._turn = (self._turn + 1) % len(self._pinned)
        buffer = self._pinned[self._turn]
        if buffer is None or buffer.numel() < total:
            buffer = torch.empty(max(4096, 2 * total), dtype=torch.int32, pin_memory=True)
            self._pinned[self._turn] = buffer
        return buffer


def to_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A few numbers that no Stager knows of. By way of pinned memory, so that the host waits for nothing."""
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def to_host(x: torch.Tensor) -> torch.Tensor:
    """A copy in pinned memory, complete when the device has done all that was launched so far; on a CPU x itself."""
    return torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, non_blocking=True) if x.is_cuda else x


def stage(step: StepInput, state: SlotState, stager: Stager) -> torch.Tensor | None:
    """Apply the step's edits and admissions to the slots; return the new decode rows (int32, None when unchanged).

    Block edits and decode rows stay in host memory, where the kernels that apply them read them; so a decode step that
    only hands out blocks copies nothing.
    """
    edits = ints(step.blocks, -1, 3)
    decode = ints(step.decode) if step.decode is not None else np.empty(0, np.int32)
    rows = None
    if edits.size or step.decode is not None:
        edits_h, rows = stager.pack([edits, decode])
        if edits.size:
            ops.edit_slots(state.tensors.tables_SM, edits_h)
    if step.admits:
        cached = [a for a in step.admits if a.cached]
        rows_h = np.array([admit_row(a) for a in step.admits], np.int32)
        admitted, *histories = stager.send([rows_h, *(ints(a.cached) for a in cached)])
        state.admit(admitted)
        for a, ids in zip(cached, histories, strict=True):
            state.tensors.history[a.slot, : len(ids)] = ids
    return rows if step.decode is not None else None


def chunk_parts(chunks: tuple[Chunk, ...]) -> list[Ints]:
    """What chunk_batch needs of the chunks: ids, positions and slots of the T tokens; slots [C], prefix sums of the
    counts [C + 1], lengths [C]; of the chunks that sample, the last token's index and the slot."""
    counts = np.array([c.num_tokens for c in chunks], np.int32)
    starts = np.array([c.start for c in chunks], np.int32)
    slots = np.array([c.slot for c in chunks], np.int32)
    ends = np.cumsum(counts, dtype=np.int32)
    query_start = np.concatenate([np.zeros(1, np.int32), ends])
    positions = np.arange(ends[-1], dtype=np.int32) + np.repeat(starts - query_start[:-1], counts)
    sample = np.array([c.sample for c in chunks], bool)
    ids = np.concatenate([ints(c.token_ids) for c in chunks])
    return [
        ids,
        positions,
        np.repeat(slots, counts),
        slots,
        query_start,
        starts + counts,
        ends[sample] - 1,
        slots[sample],
    ]


def chunk_batch(
    parts: list[torch.Tensor],
    lengths: tuple[tuple[int, ...], tuple[int, ...]],
    state: SlotState,
    block_size: int,
) -> ChunkBatch:
    """The chunks of a pass from `chunk_parts` on the device. lengths: tokens of each chunk and of its context.

    Tokens of the padding slot have no place in the cache.
    """
    ids, positions, token_slots, slots, query_start, lengths_C, sampled, sampled_slots = parts
    where, of = positions.long(), token_slots.long()
    tables = state.tensors.tables_SM
    blocks = tables[of, where // block_size].long()
    places = blocks * block_size + where % block_size
    slots_C = slots.long()
    rows = PrefillRows(
        tables_CM=tables[slots_C],
        query_start=query_start,
        lengths_C=lengths_C,
        num_query=lengths[0],
        num_context=lengths[1],
    )
    return ChunkBatch(
        ids=ids,
        positions=positions,
        cache_slots=torch.where(token_slots == state.tensors.padding_slot, -1, places),
        slots_C=slots_C,
        rows=rows,
        sampled=sampled.long(),
        sampled_slots=sampled_slots,
        token_slots=of,
    )


def eager_chunks(
    chunks: tuple[Chunk, ...],
    parts: list[torch.Tensor],
    state: SlotState,
    block_size: int,
    targets: torch.Tensor | None = None,
) -> ChunkBatch:
    """The chunks of a pass that is launched kernel by kernel. targets: `target_part` on the device."""
    counts = tuple(c.num_tokens for c in chunks)
    lengths = (counts, tuple(c.start + c.num_tokens for c in chunks))
    batch = chunk_batch(parts, lengths, state, block_size)
    return batch if targets is None else replace(batch, targets=targets, scored=tuple(_scored(chunks, state)))


def blank_prompt(slot: int, num_tokens: int, state: SlotState, block_size: int) -> ChunkBatch:
    """A whole prompt of zeros in a pass that is launched kernel by kernel, to see it run; nothing samples it."""
    chunks = (Chunk(slot, 0, packed([0] * num_tokens), False),)
    sent = Stager(state.tensors.length.device, 1).send(chunk_parts(chunks))
    return eager_chunks(chunks, sent, state, block_size)


def target_part(chunks: tuple[Chunk, ...]) -> Ints:
    """Targets of all chunks, one after another."""
    return np.concatenate([ints(c.targets) for c in chunks])


def _scored(chunks: tuple[Chunk, ...], state: SlotState) -> Iterator[ScoredChunk]:
    first = 0
    for index, chunk in enumerate(chunks):
        if chunk.targets:
            wanted = state.params[chunk.slot].prompt_logprobs
            yield ScoredChunk(index, first, len(chunk.targets) // 4, wanted)
        first += chunk.num_tokens
