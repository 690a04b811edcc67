"""Per-slot state on the rank's device at fixed addresses; the device advances it, the host only edits it.

S slots plus one that padding rows use (its length stays 0). M table width. A step reads and writes these tensors in
stream order, so the next step can be launched before this one's tokens are known to anybody on the host.
"""

from __future__ import annotations

import numpy as np
import torch

from tpqwen.kernels.context import SlotTensors
from tpqwen.step import DRAFT_ROWS, MANY_CHUNKS, Admit, Ints, RowParams

INT_FIELDS = ("top_k", "choice", "min_tokens")
FLOAT_FIELDS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
RING = 8  # passes whose tokens the ring keeps: more than are ever in flight
NUM_FIELDS = len(INT_FIELDS) + len(FLOAT_FIELDS)
ADMIT_INTS = NUM_FIELDS + 4  # slot, out_index, seed low, seed high come first


def admit_row(admit: Admit) -> list[int]:
    """One admission as ADMIT_INTS int32 values; floats travel as their bit patterns."""
    p = admit.params
    floats = np.array([getattr(p, f) for f in FLOAT_FIELDS], np.float32).view(np.int32)
    seed = np.array([p.seed], np.uint64).view(np.int32)
    return [admit.slot, admit.out_index, *seed.tolist(), *(getattr(p, f) for f in INT_FIELDS), *floats.tolist()]


class RowTensors:
    """Sampling parameters of R rows: views into one [NUM_FIELDS, R] tensor. Names as in RowParams."""

    def __init__(self, fields: torch.Tensor, seeds: torch.Tensor) -> None:
        self.seed = seeds
        floats = fields.view(torch.float32)
        self.top_k, self.choice, self.min_tokens = (fields[i] for i in range(len(INT_FIELDS)))
        (
            self.temperature,
            self.top_p,
            self.min_p,
            self.presence_penalty,
            self.frequency_penalty,
            self.repetition_penalty,
        ) = (floats[len(INT_FIELDS) + i] for i in range(len(FLOAT_FIELDS)))


class SlotState:
    """All that a rank remembers about its slots besides the KV blocks themselves. `tensors` is what kernels see.

    drafts: tokens that a speculative step drafts for a row; 0: there are none. positions: of a sequence, at most; the
    tokens at them are kept where drafts are made.
    """

    def __init__(
        self, num_slots: int, table_width: int, device: torch.device, *, positions: int = 0, drafts: int = 0
    ) -> None:
        size = num_slots + 1
        self.fields = torch.zeros(NUM_FIELDS, size, dtype=torch.int32, device=device)
        named = RowTensors(self.fields, torch.zeros(size, dtype=torch.int64, device=device))

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        width = max(num_slots + MANY_CHUNKS, min(num_slots, DRAFT_ROWS) * (drafts + 1))
        self.tensors = SlotTensors(
            tables_SM=zeros(size, table_width),
            length=zeros(size),
            last_token=zeros(size),
            out_index=zeros(size),
            seed=named.seed,
            choice=named.choice,
            top_k=named.top_k,
            temperature=named.temperature,
            top_p=named.top_p,
            min_p=named.min_p,
            turn=zeros(1),
            ring=torch.zeros(RING, width, dtype=torch.int32, pin_memory=device.type == "cuda"),
            stamps=torch.zeros(RING, 2, dtype=torch.int64, pin_memory=device.type == "cuda"),
            history=zeros(size, positions if drafts else 0),
        )
        self.params: dict[int, RowParams] = {}  # the host's copy, by slot

    def admit(self, rows: torch.Tensor) -> None:
        """Take slots over. rows int32 [A, ADMIT_INTS] on the device, as made by `admit_row`."""
        slots = rows[:, 0].long()
        self.tensors.out_index[slots] = rows[:, 1]
        self.tensors.seed[slots] = (rows[:, 3].long() << 32) | (rows[:, 2].long() & 0xFFFFFFFF)
        self.fields[:, slots] = rows[:, 4:].t()

    def ring_row(self, turn: int) -> Ints:
        """What the turn-th pass leaves in the ring, or has left."""
        row: Ints = self.tensors.ring.numpy()[turn % RING]
        return row

    def gather(self, slots: torch.Tensor) -> RowTensors:
        """Parameters of the given slots (int32 [R]) in that order."""
        return RowTensors(self.fields[:, slots], self.tensors.seed[slots])
