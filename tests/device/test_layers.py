"""Tensor-parallel layers without processes: the ranks' results, put together, are those of a group of one."""

from __future__ import annotations

import pytest
import torch

from tpqwen.kernels import ops, reference
from tpqwen.parallel.group import TPGroup
from tpqwen.parallel.layers import ColumnParallel, RowParallel, ShardedWeight, VocabParallel

HIDDEN, INNER, VOCAB, NUM_IDS = 12, 16, 27, 21


class Collected(TPGroup):
    """A rank whose all_reduce notes the partial sum and leaves it."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size, None)
        self.partial: list[torch.Tensor] = []

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        self.partial.append(x.clone())
        return x


def filled(layer: ShardedWeight, tensors: dict[str, torch.Tensor]) -> ShardedWeight:
    layer.weight.data.zero_()
    for part in layer.parts:
        piece = tensors[part.name][part.spec.index(layer.group.rank, layer.group.size)]
        layer.weight.data[part.offset : part.offset + len(piece)] = piece
    return layer


@pytest.mark.parametrize("size", [1, 2, 4])
def test_row_parallel_partial_sums_add_up_to_the_product(size):
    weight, x, residual = torch.randn(HIDDEN, INNER), torch.randn(3, INNER), torch.randn(3, HIDDEN)
    width, total = INNER // size, torch.zeros(3, HIDDEN)
    for rank in range(size):
        group = Collected(rank, size)
        layer = filled(RowParallel(group, "w", (HIDDEN, INNER), INNER, invariant=False), {"w": weight})
        out, _ = layer(x[:, rank * width : (rank + 1) * width], residual)
        total += group.partial[0] if group.partial else out - residual
        assert len(group.partial) == (size > 1)
        if group.partial:
            torch.testing.assert_close(out, residual + group.partial[0])
    torch.testing.assert_close(total, x @ weight.T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_gate_and_up_stay_paired_on_every_rank(size):
    gate, up, norm, h = (
        torch.randn(INNER, HIDDEN),
        torch.randn(INNER, HIDDEN),
        torch.rand(HIDDEN),
        torch.randn(3, HIDDEN),
    )
    parts = []
    for rank in range(size):
        projections = {"gate": (INNER, INNER), "up": (INNER, INNER)}
        layer = filled(ColumnParallel(TPGroup(rank, size, None), HIDDEN, projections), {"gate": gate, "up": up})
        parts.append(ops.norm_gate_up(h, norm, 1e-6, layer.weight))
    expected = reference.norm_gate_up(h, norm, 1e-6, torch.cat((gate, up)))
    torch.testing.assert_close(torch.cat(parts, 1), expected)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_vocabulary_shards_give_all_embeddings_and_masked_logits(size):
    weight, norm, h = torch.randn(VOCAB, HIDDEN), torch.ones(HIDDEN), torch.randn(2, HIDDEN)
    ids = torch.tensor([0, 26, 13, 7, 20])
    total, logits = torch.zeros(len(ids), HIDDEN), []
    for rank in range(size):
        layer = filled(VocabParallel(Collected(rank, size), "e", VOCAB, HIDDEN, NUM_IDS), {"e": weight})
        total += layer.embed(ids)
        logits.append(layer.logits(h, norm, 1e-6))
        assert layer.first_id == rank * logits[0].shape[1]
    torch.testing.assert_close(total, weight[ids])
    whole = torch.cat(logits, 1)
    torch.testing.assert_close(whole[:, :NUM_IDS], reference.norm_linear(h, norm, 1e-6, weight)[:, :NUM_IDS])
    assert (whole[:, NUM_IDS:] == float("-inf")).all()


def test_group_of_one_does_nothing():
    group, x = TPGroup.single(), torch.randn(3)
    assert group.all_reduce(x) is x
    assert torch.equal(group.all_gather(x), x[None])
    group.barrier()
    group.leave()


def test_an_ordered_sum_does_not_depend_on_where_an_element_stands():
    class Gathered(TPGroup):
        def all_gather(self, x: torch.Tensor) -> torch.Tensor:
            return parts[:, : len(x)].to(x.dtype)

    parts = torch.tensor([1.0, 2.0**-24, 2.0**-24, -1.0])[:, None].expand(4, 300)
    group = Gathered(0, 4, None)
    for count in (1, 2, 17, 300):
        assert group.ordered_sum(torch.zeros(count)).tolist() == [0.0] * count, "1 + 2**-24 is 1, twice"
    assert group.ordered_sum(torch.zeros(2, dtype=torch.bfloat16)).dtype == torch.bfloat16
