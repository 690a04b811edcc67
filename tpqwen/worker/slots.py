"""Per-slot state on the rank's device at fixed addresses; the device advances it, the host only edits it.

S slots plus one that padding rows use (its length stays 0). M table width. A step reads and writes these tensors in
stream order, so the next step can be launched before this one's tokens are known to anybody on the host.
"""

from __future__ import annotations

import numpy as np
import torch

from tpqwen.step import Admit, RowParams

INT_FIELDS = ("top_k", "choice", "min_tokens")
FLOAT_FIELDS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
NUM_FIELDS = len(INT_FIELDS) + len(FLOAT_FIELDS)
ADMIT_INTS = NUM_FIELDS + 4  # slot, out_index, seed low, seed high come first


def admit_row(admit: Admit) -> list[int]:
    """One admission as ADMIT_INTS int32 values; floats travel as their bit patterns."""
    p = admit.params
    floats = np.array([getattr(p, f) for f in FLOAT_FIELDS], np.float32).view(np.int32)
    seed = np.array([p.seed], np.uint64).view(np.int32)
    return [admit.slot, admit.out_index, *seed.tolist(), *(getattr(p, f) for f in INT_FIELDS), *floats.tolist()]


class RowTensors:
    """Sampling parameters of R rows: views into one gathered [NUM_FIELDS, R] tensor. Names as in RowParams."""

    def __init__(self, fields: torch.Tensor, seeds: torch.Tensor) -> None:
        self._fields = fields
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

    def take(self, count: int) -> RowTensors:
        """The first `count` rows, as views."""
        return RowTensors(self._fields[:, :count], self.seed[:count])

    def copy_(self, other: RowTensors) -> None:
        """Overwrite in place with another of at most as many rows."""
        count = other.seed.shape[0]
        self._fields[:, :count] = other._fields
        self.seed[:count] = other.seed


class SlotState:
    """All that a rank remembers about its slots besides the KV blocks themselves."""

    def __init__(self, num_slots: int, table_width: int, device: torch.device) -> None:
        size = num_slots + 1
        self.padding_slot = num_slots
        self.tables = torch.zeros(size, table_width, dtype=torch.int32, device=device)
        self.last_token = torch.zeros(size, dtype=torch.int32, device=device)
        self.length = torch.zeros(size, dtype=torch.int32, device=device)  # tokens in the cache
        self.out_index = torch.zeros(size, dtype=torch.int32, device=device)  # index of the next output token
        self.seed = torch.zeros(size, dtype=torch.int64, device=device)
        self.fields = torch.zeros(NUM_FIELDS, size, dtype=torch.int32, device=device)
        self.params: dict[int, RowParams] = {}  # the host's copy, by slot

    def admit(self, admits: tuple[Admit, ...], rows: torch.Tensor) -> None:
        """Take the slots over. rows int32 [A, ADMIT_INTS] on the device, as made by `admit_row`."""
        slots = rows[:, 0].long()
        self.out_index[slots] = rows[:, 1]
        self.seed[slots] = (rows[:, 3].long() << 32) | (rows[:, 2].long() & 0xFFFFFFFF)
        self.fields[:, slots] = rows[:, 4:].t()
        for a in admits:
            self.params[a.slot] = a.params

    def set_blocks(self, edits: torch.Tensor) -> None:
        """edits int32 [n, 3] on the device: slot, index in its table, block id."""
        e = edits.long()
        self.tables[e[:, 0], e[:, 1]] = edits[:, 2]

    def gather(self, slots: torch.Tensor) -> RowTensors:
        """Parameters of the given slots (int64 [R]) in that order."""
        return RowTensors(self.fields[:, slots], self.seed[slots])
