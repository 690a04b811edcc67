"""Tensor-parallel layers: each owns its sharding and says which checkpoint tensors it is made of.

T tokens, H hidden, F fused rows, I inner, V vocabulary; all but H are local sizes. Weights are [out, in], no biases.
The projections' weights may be quantized (quant/schemes.py); norms, embedding and LM head never are.
"""

from __future__ import annotations

import torch
from torch import nn

from tpqwen.kernels import ops
from tpqwen.kernels.context import NormedProduct, Scaled, SlotTensors
from tpqwen.parallel.group import TPGroup
from tpqwen.parallel.shard import Part, ShardSpec
from tpqwen.quant.schemes import NONE, Scheme


class ShardedWeight(nn.Module):
    """A weight made of slices of checkpoint tensors, one below the other. `parts` is all that loading needs to know.

    scale: fp32, one for each row of a quantized weight; otherwise None.
    """

    def __init__(self, group: TPGroup, specs: dict[str, ShardSpec], scheme: Scheme = NONE) -> None:
        super().__init__()
        self.group = group
        self.scheme = scheme
        self.scale: nn.Parameter | None = None
        self.parts: list[Part] = []
        rows = 0
        shape: tuple[int, ...] = ()
        for name, spec in specs.items():
            self.parts.append(Part(name, spec, rows))
            shape = spec.local_shape(group.size)
            rows += shape[0]
        self.weight = nn.Parameter(torch.empty(rows, *shape[1:]), requires_grad=False)
        if scheme.scaled:
            self.scale = nn.Parameter(torch.empty(rows), requires_grad=False)

    @property
    def matrix(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and scale, as products take them."""
        return self.weight, self.scale

    def allocate(self, device: torch.device, dtype: torch.dtype) -> None:
        """Give the parameters real, zeroed storage, for a model that computes in `dtype`."""
        stored = torch.zeros(self.weight.shape, dtype=self.scheme.stored(dtype), device=device)
        self.weight = nn.Parameter(stored, requires_grad=False)
        if self.scale is not None:
            scale = torch.zeros(self.scale.shape, dtype=torch.float32, device=device)
            self.scale = nn.Parameter(scale, requires_grad=False)

    def num_bytes(self, dtype: torch.dtype) -> int:
        """Of the parameters, once a model that computes in `dtype` has allocated them."""
        scales = 0 if self.scale is None else self.scale.numel() * torch.float32.itemsize
        return self.weight.numel() * self.scheme.stored(dtype).itemsize + scales


class ReplicatedWeight(ShardedWeight):
    """A whole tensor on every rank: norm weights."""

    def __init__(self, group: TPGroup, name: str, *shape: int) -> None:
        super().__init__(group, {name: ShardSpec(shape)})


class ColumnParallel(ShardedWeight):
    """Several projections of the same input, each split by `units` along its rows: q, k and v, or gate and up."""

    def __init__(
        self, group: TPGroup, hidden: int, projections: dict[str, tuple[int, int]], scheme: Scheme = NONE
    ) -> None:
        """projections: checkpoint name -> (rows, units that may not be cut)."""
        specs = {n: ShardSpec((rows, hidden), 0, units) for n, (rows, units) in projections.items()}
        super().__init__(group, specs, scheme)


class RowParallel(ShardedWeight):
    """A projection whose input is split; the ranks' partial sums are added up, then the residual."""

    def __init__(
        self, group: TPGroup, name: str, shape: tuple[int, int], units: int, *, invariant: bool, scheme: Scheme = NONE
    ) -> None:
        """shape: (hidden, inner) of the full weight; units: of inner, which may not be cut."""
        super().__init__(group, {name: ShardSpec(shape, 1, units)}, scheme)
        self.invariant = invariant

    def forward(
        self, x_TI: torch.Tensor, residual_TH: torch.Tensor, following: NormedProduct | None = None
    ) -> tuple[torch.Tensor, Scaled | None]:
        """residual + sum over ranks of x W^T, [T, H], and what the product that follows should be given with it."""
        if self.group.size > 1:  # no rank has whole sums before they are exchanged
            partial = ops.linear(x_TI, *self.matrix, invariant=self.invariant)
            return self.group.add_reduced(partial, residual_TH, ordered=self.invariant), None
        operands = (x_TI, self.weight, residual_TH, self.scale)
        if following is None:
            return ops.linear_add(*operands, invariant=self.invariant), None
        return ops.linear_add_scaled(*operands, following, invariant=self.invariant)


class VocabParallel(ShardedWeight):
    """Rows of the vocabulary, padded up to a multiple of the ranks: the embedding and the LM head.

    num_ids: ids below it are real, rows above are padding that checkpoints carry. first_id: global id of the first
    local row. num_valid: local rows that are real ids.
    """

    def __init__(
        self, group: TPGroup, name: str, vocab_size: int, hidden: int, num_ids: int, *, invariant: bool = False
    ) -> None:
        spec = ShardSpec((vocab_size, hidden), 0, vocab_size, padded=True)
        super().__init__(group, {name: spec})
        self.invariant = invariant
        self.num_local = spec.local_units(group.size)
        self.first_id = group.rank * self.num_local
        self.num_valid = max(0, min(self.num_local, num_ids - self.first_id))

    def embed(self, ids_T: torch.Tensor) -> torch.Tensor:
        """Embeddings [T, H]: each rank looks up its own ids, the sum over ranks is the whole (exact in any order: all
        terms but one are zero)."""
        if self.group.size == 1:
            return nn.functional.embedding(ids_T, self.weight)
        local = ids_T - self.first_id
        mine = (local >= 0) & (local < self.num_local)
        rows = nn.functional.embedding(torch.where(mine, local, 0), self.weight)
        return self.group.all_reduce(rows * mine[:, None])

    def logits(self, h_TH: torch.Tensor, norm_H: torch.Tensor, eps: float) -> torch.Tensor:
        """Final norm and head: this rank's logits [T, V], padding at -inf."""
        logits = ops.norm_linear(h_TH, norm_H, eps, self.weight, invariant=self.invariant)
        if self.num_valid < self.num_local:
            logits[:, self.num_valid :] = float("-inf")
        return logits

    def slices(
        self, h_RH: torch.Tensor, norm_H: torch.Tensor, eps: float, state: SlotTensors, slots_R: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Final norm, head and noisy arg-max of this rank's ids, without logits in memory: ops.head_slices."""
        where = (state, slots_R, self.first_id, self.num_valid)
        return ops.head_slices(h_RH, norm_H, eps, self.weight, *where, invariant=self.invariant)
