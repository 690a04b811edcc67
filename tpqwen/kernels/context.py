"""What kernels are given besides activations and weights: the slots' state, StepContext, one forward pass, and what
products tell each other.

T tokens, B decode rows, C chunks, S slots, M table width, N query heads, K key/value heads, D head size, P block size.
The pass runs over T = B + prefill tokens: first one token of each decode row, then the chunks one after another.
All tensors live at fixed addresses when the pass is captured as a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch


@dataclass(frozen=True)
class SlotTensors:
    """Per-slot state on the device, [S + 1]: the last slot belongs to padding rows. Kernels advance it in place.

    turn counts passes begun. A pass leaves its tokens in ring[(turn - 1) % len(ring)], in row order; on a GPU the ring
    is pinned host memory that kernels write into, so no copy brings the tokens back.
    history holds each slot's tokens by position, that of last_token included; with no columns it is not kept.
    """

    tables_SM: torch.Tensor  # int32, block ids
    length: torch.Tensor  # int32, tokens in the cache
    last_token: torch.Tensor  # int32
    out_index: torch.Tensor  # int32, index of the next output token
    seed: torch.Tensor  # int64
    choice: torch.Tensor  # int32
    top_k: torch.Tensor  # int32
    temperature: torch.Tensor  # fp32
    top_p: torch.Tensor  # fp32
    min_p: torch.Tensor  # fp32
    turn: torch.Tensor  # int32 [1]
    ring: torch.Tensor  # int32 [passes, S]
    stamps: torch.Tensor  # int64 [passes, 2]: a GPU's clock in ns at the pass's begin and end, pinned like the ring
    history: torch.Tensor  # int32 [S + 1, positions]

    @property
    def padding_slot(self) -> int:
        """The slot of rows that do not exist."""
        return len(self.length) - 1


class DecodeInputs(NamedTuple):
    """What one decode pass starts from, per row."""

    ids_B: torch.Tensor  # int32
    positions_B: torch.Tensor  # int32
    cache_slots_B: torch.Tensor  # int64
    lengths_B: torch.Tensor  # int32


class DraftInputs(NamedTuple):
    """What a speculative pass starts from. T tokens for each of B rows, one row after another: its last one and those
    drafted for it. rows: what each of the B * T tokens is sampled with, as slots of their own; slots names them."""

    ids: torch.Tensor  # int32 [B * T]
    positions: torch.Tensor  # int32 [B * T]
    cache_slots: torch.Tensor  # int64 [B * T]
    lengths_B: torch.Tensor  # int32, tokens in the cache with all of them
    slots: torch.Tensor  # int32 [B * T]
    rows: SlotTensors


@dataclass(frozen=True)
class PrefillRows:
    """C chunks. query_start is the prefix sum of chunk lengths, relative to the first prefill token."""

    tables_CM: torch.Tensor  # int32, block ids
    query_start: torch.Tensor  # int32 [C + 1]
    lengths_C: torch.Tensor  # int32, tokens in the cache after this chunk is written
    num_query: tuple[int, ...]  # chunk lengths, on the host
    num_context: tuple[int, ...]  # lengths_C, on the host

    @property
    def max_query(self) -> int:
        """Longest chunk, tokens."""
        return max(self.num_query)


@dataclass(frozen=True, eq=False)
class StepContext:
    """num_decode rows of one token, then the prefill tokens. Compared by identity: one object per pass.

    settled: tables and decode inputs were complete before the last kernel that was launched without PDL, and no chunk
    of this pass writes blocks that decode rows read, so kernels may read all that early (kernels/launch.py).
    wide: some decode row is long, so that attention should divide it among more programs (kernels/attention_table.py).
    """

    positions_T: torch.Tensor  # int32
    cache_slots_T: torch.Tensor  # int64: block id * P + offset; -1 on padding rows (nothing is written)
    num_decode: int
    tables_SM: torch.Tensor  # int32, of all slots
    decode_slots_B: torch.Tensor  # int32, each row's table
    decode_lengths_B: torch.Tensor  # int32, tokens in the cache including the one of this step; 0 on padding rows
    prefill: PrefillRows | None
    k_cache: list[torch.Tensor]  # per layer [blocks, K, P, D]
    v_cache: list[torch.Tensor]
    cos_sin: torch.Tensor  # fp32 [positions, D]: cos of the D/2 frequencies, then sin
    settled: bool = False
    wide: bool = False


class NormedProduct(NamedTuple):
    """What ops.norm_linear ("norm") or ops.norm_gate_up ("silu") is given besides its rows."""

    operation: str
    norm_H: torch.Tensor
    weight_OH: torch.Tensor


class Scaled(NamedTuple):
    """Rows of the residual stream times a norm's weights, still to be divided by their rms, and the sums of squares of
    the P pieces of each row, fp32."""

    values_TH: torch.Tensor
    squares_PT: torch.Tensor
