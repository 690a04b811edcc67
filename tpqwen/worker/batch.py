"""StepInput -> device tensors of one pass, with at most one host-to-device copy.

T tokens, B decode rows, C chunks, R sampled rows. All integers of a step go into one pinned buffer. Buffers rotate so
that a step may be packed while earlier ones still have to run.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from tpqwen.kernels import ops
from tpqwen.kernels.context import PrefillRows
from tpqwen.step import Chunk, Ints, StepInput, ints
from tpqwen.worker.slots import SlotState, admit_row


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
    sampled_slots_host: tuple[int, ...]


class Stager:
    """Packs the integers of one step; `depth` buffers rotate."""

    def __init__(self, device: torch.device, depth: int) -> None:
        self._cuda = device.type == "cuda"
        self._device = device
        self._pinned: list[torch.Tensor | None] = [None] * depth
        self._turn = 0

    def pack(self, parts: list[Ints]) -> list[torch.Tensor]:
        """Each part (int32, any shape) as a host tensor, one after another in one buffer; pinned for a GPU."""
        total = sum(p.size for p in parts)
        buffer = self._buffer(total)
        if total:
            np.concatenate([p.reshape(-1) for p in parts], out=buffer[:total].numpy())
        views = torch.split(buffer[:total], [p.size for p in parts])
        return [v.view(p.shape) for v, p in zip(views, parts, strict=True)]

    def send(self, packed: list[torch.Tensor]) -> list[torch.Tensor]:
        """Consecutive parts of `pack` on the device, all through one copy."""
        if not self._cuda:
            return packed
        base = packed[0]
        sizes = [p.numel() for p in packed]
        flat = torch.as_strided(base, (sum(sizes),), (1,), base.storage_offset())
        moved = torch.split(flat.to(self._device, non_blocking=True), sizes)
        return [m.view(p.shape) for m, p in zip(moved, packed, strict=True)]

    def _buffer(self, total: int) -> torch.Tensor:
        if not self._cuda:
            return torch.empty(total, dtype=torch.int32)
        self._turn = (self._turn + 1) % len(self._pinned)
        buffer = self._pinned[self._turn]
        if buffer is None or buffer.numel() < total:
            buffer = torch.empty(max(4096, 2 * total), dtype=torch.int32, pin_memory=True)
            self._pinned[self._turn] = buffer
        return buffer


def stage(
    step: StepInput, state: SlotState, stager: Stager, block_size: int
) -> tuple[torch.Tensor | None, ChunkBatch | None]:
    """Apply the step's edits to the slots; return the new decode rows (int32, None when unchanged) and the chunks.

    Block edits and decode rows stay in host memory, where the kernels that apply them read them; so a decode step that
    only hands out blocks copies nothing.
    """
    edits = ints(step.blocks, -1, 3)
    decode = ints(step.decode) if step.decode is not None else np.empty(0, np.int32)
    parts = [edits, decode]
    if step.admits:
        parts.append(np.array([admit_row(a) for a in step.admits], np.int32))
    if step.chunks:
        parts += _chunk_parts(step.chunks)
    edits_h, rows, *rest = stager.pack(parts)
    if edits.size:
        ops.edit_slots(state.tensors.tables_SM, edits_h)
    sent = stager.send(rest) if rest else []
    if step.admits:
        state.admit(step.admits, sent.pop(0))
    return (
        rows if step.decode is not None else None,
        _chunk_batch(step.chunks, sent, state, block_size) if sent else None,
    )


def _chunk_parts(chunks: tuple[Chunk, ...]) -> list[Ints]:
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


def _chunk_batch(chunks: tuple[Chunk, ...], parts: list[torch.Tensor], state: SlotState, block_size: int) -> ChunkBatch:
    ids, positions, token_slots, slots, query_start, lengths, sampled, sampled_slots = parts
    where = positions.long()
    tables = state.tensors.tables_SM
    blocks = tables[token_slots.long(), where // block_size].long()
    slots_C = slots.long()
    rows = PrefillRows(
        tables_CM=tables[slots_C],
        query_start=query_start,
        lengths_C=lengths,
        num_query=tuple(c.num_tokens for c in chunks),
        num_context=tuple(c.start + c.num_tokens for c in chunks),
    )
    return ChunkBatch(
        ids=ids,
        positions=positions,
        cache_slots=blocks * block_size + where % block_size,
        slots_C=slots_C,
        rows=rows,
        sampled=sampled.long(),
        sampled_slots=sampled_slots,
        sampled_slots_host=tuple(c.slot for c in chunks if c.sample),
    )
