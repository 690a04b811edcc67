"""StepInput -> device tensors of one pass, with a single host-to-device copy.

T tokens, B decode rows, C chunks, R sampled rows. All integers of a step go into one pinned buffer; the device tensors
are slices of its copy. Buffers rotate so that a step may be packed while earlier ones are still being copied.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from tpqwen.kernels.context import PrefillRows
from tpqwen.step import Chunk, Ints, StepInput, ints
from tpqwen.worker.slots import ADMIT_INTS, SlotState, admit_row


@dataclass(frozen=True)
class ChunkBatch:
    """The prefill part of a step on the device."""

    ids: torch.Tensor  # int32 [T]
    positions: torch.Tensor  # int32 [T]
    cache_slots: torch.Tensor  # int64 [T]
    slots_C: torch.Tensor  # int64
    rows: PrefillRows
    sampled: torch.Tensor  # int64, index of each sampling chunk's last token among the prefill tokens
    sampled_slots: torch.Tensor  # int64
    sampled_slots_host: tuple[int, ...]


class Stager:
    """Packs the integers of one step; `depth` buffers rotate."""

    def __init__(self, device: torch.device, depth: int) -> None:
        self._device = device
        self._pinned: list[torch.Tensor | None] = [None] * depth
        self._turn = 0

    def copy(self, parts: list[Ints]) -> list[torch.Tensor]:
        """Each part (int32, any shape) as a device tensor, all through one copy."""
        flat = np.concatenate([p.reshape(-1) for p in parts]) if parts else np.empty(0, np.int32)
        if self._device.type == "cpu":
            moved = torch.from_numpy(flat)
        else:
            moved = self._pin(flat).to(self._device, non_blocking=True)
        split = torch.split(moved, [p.size for p in parts])
        return [s.view(p.shape) for s, p in zip(split, parts, strict=True)]

    def _pin(self, flat: Ints) -> torch.Tensor:
        self._turn = (self._turn + 1) % len(self._pinned)
        buffer = self._pinned[self._turn]
        if buffer is None or buffer.numel() < flat.size:
            buffer = torch.empty(max(4096, 2 * flat.size), dtype=torch.int32, pin_memory=True)
            self._pinned[self._turn] = buffer
        buffer[: flat.size].numpy()[:] = flat
        return buffer[: flat.size]


def stage(
    step: StepInput, state: SlotState, stager: Stager, block_size: int
) -> tuple[torch.Tensor | None, ChunkBatch | None]:
    """Apply the step's edits to the slots; return the new decode rows (int64, None when unchanged) and the chunks."""
    admits = np.array([admit_row(a) for a in step.admits], np.int32).reshape(-1, ADMIT_INTS)
    edits = ints(step.blocks, -1, 3)
    decode = ints(step.decode) if step.decode is not None else np.empty(0, np.int32)
    parts = [admits, edits, decode, *(_chunk_parts(step.chunks) if step.chunks else ())]
    if not any(p.size for p in parts):
        return (
            torch.empty(0, dtype=torch.int64, device=state.length.device) if step.decode is not None else None
        ), None
    admits_d, edits_d, decode_d, *chunk_d = stager.copy(parts)
    if step.admits:
        state.admit(step.admits, admits_d)
    if edits.size:
        state.set_blocks(edits_d)
    rows = decode_d.long() if step.decode is not None else None
    return rows, (_chunk_batch(step.chunks, chunk_d, state, block_size) if chunk_d else None)


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
    blocks = state.tables[token_slots.long(), where // block_size].long()
    slots_C = slots.long()
    rows = PrefillRows(
        tables_CM=state.tables[slots_C],
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
        sampled_slots=sampled_slots.long(),
        sampled_slots_host=tuple(c.slot for c in chunks if c.sample),
    )
