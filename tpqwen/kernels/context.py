"""StepContext: everything a forward pass needs besides token ids, as one explicit argument.

T tokens, B decode rows, C chunks, M table width, N query heads, K key/value heads, D head size, P block size, L layers.
The pass runs over T = B + prefill tokens: first one token of each decode row, then the chunks one after another.
All tensors live at fixed addresses when the pass is captured as a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


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

    @property
    def fresh(self) -> bool:
        """Every chunk starts at position 0: its keys are exactly its own."""
        return self.num_query == self.num_context


@dataclass(frozen=True)
class StepContext:
    """num_decode rows of one token, then the prefill tokens."""

    positions_T: torch.Tensor  # int32
    cache_slots_T: torch.Tensor  # int64: block id * P + offset; -1 on padding rows (nothing is written)
    num_decode: int
    decode_tables_BM: torch.Tensor  # int32
    decode_lengths_B: torch.Tensor  # int32, tokens in the cache including the one of this step; 0 on padding rows
    prefill: PrefillRows | None
    k_cache: list[torch.Tensor]  # per layer [blocks, K, P, D]
    v_cache: list[torch.Tensor]
    cos_sin: torch.Tensor  # fp32 [positions, D]: cos of the D/2 frequencies, then sin
