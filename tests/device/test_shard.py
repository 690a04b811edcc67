"""Shards as data: the slices of all ranks, put together, are the full tensor."""

from __future__ import annotations

import pytest
import torch

from tpqwen.errors import ConfigError
from tpqwen.parallel.shard import ShardSpec

DEGREES = (1, 2, 4, 8)


@pytest.mark.parametrize("size", DEGREES)
@pytest.mark.parametrize("axis", [0, 1])
def test_slices_of_all_ranks_give_the_full_tensor(axis, size):
    full = torch.arange(32 * 48).view(32, 48)
    spec = ShardSpec((32, 48), axis, 8)
    slices = [full[spec.index(rank, size)] for rank in range(size)]
    assert torch.equal(torch.cat(slices, axis), full)
    assert {tuple(s.shape) for s in slices} == {spec.local_shape(size)}


@pytest.mark.parametrize("size", DEGREES)
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_each_rank_holds_the_kv_head_of_its_query_heads(heads, size):
    spec = ShardSpec((heads * 16, 5), 0, heads)
    for rank in range(size):
        first, length = spec.span(rank, size)
        assert length == max(1, heads // size) * 16
        assert first == rank * heads // size * 16
    covered = {row for rank in range(size) for row in range(*_range(spec, rank, size))}
    assert covered == set(range(heads * 16))


@pytest.mark.parametrize("size", DEGREES)
@pytest.mark.parametrize("rows", [320, 321, 515, 3])
def test_padded_rows_divide_over_any_degree(rows, size):
    full = torch.arange(rows * 2).view(rows, 2)
    spec = ShardSpec((rows, 2), 0, rows, padded=True)
    slices = [full[spec.index(rank, size)] for rank in range(size)]
    assert torch.equal(torch.cat(slices), full)
    assert all(len(s) <= spec.local_units(size) for s in slices)
    assert spec.local_shape(size) == (-(-rows // size), 2)


@pytest.mark.parametrize("size", DEGREES)
def test_replicated_tensor_is_whole_on_every_rank(size):
    spec = ShardSpec((7,))
    assert spec.local_shape(size) == (7,)
    assert all(spec.index(rank, size) == (slice(0, 7),) for rank in range(size))


def test_units_that_do_not_divide_are_refused_with_both_numbers():
    with pytest.raises(ConfigError, match=r"6.*4"):
        ShardSpec((6, 2), 0, 6).local_shape(4)


def _range(spec: ShardSpec, rank: int, size: int) -> tuple[int, int]:
    first, length = spec.span(rank, size)
    return first, first + length
