"""Prefix hashes: equal prefixes meet, everything else does not."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpqwen.cache.blocks import BlockPool
from tpqwen.cache.prefix import PrefixCache

SIZE = 4
TOKENS = st.lists(st.integers(0, 2), max_size=20)


def digests(tokens: list[int], salt: str = "", count: int | None = None) -> list[bytes]:
    out: list[bytes] = []
    count = len(tokens) // SIZE if count is None else count
    PrefixCache(BlockPool(2), SIZE).extend(out, array("i", tokens), count, salt)
    return out


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(a=TOKENS, b=TOKENS, salt_a=st.sampled_from("xy"), salt_b=st.sampled_from("xy"))
def test_digests_agree_as_far_as_salt_and_tokens_do(a: list[int], b: list[int], salt_a: str, salt_b: str) -> None:
    for i, (x, y) in enumerate(zip(digests(a, salt_a), digests(b, salt_b), strict=False)):
        same = salt_a == salt_b and a[: (i + 1) * SIZE] == b[: (i + 1) * SIZE]
        assert (x == y) == same


@given(tokens=TOKENS, cuts=st.lists(st.integers(0, 5), max_size=4))
@settings(max_examples=50, derandomize=True, deadline=None, database=None)
def test_digests_made_piece_by_piece_equal_those_made_at_once(tokens: list[int], cuts: list[int]) -> None:
    prefix = PrefixCache(BlockPool(2), SIZE)
    out: list[bytes] = []
    full = len(tokens) // SIZE
    for count in sorted(min(c, full) for c in [*cuts, full]):
        prefix.extend(out, array("i", tokens), count, "")
    assert out == digests(tokens)


def test_a_token_split_otherwise_into_blocks_is_another_prefix() -> None:
    assert digests([1, 2, 3, 4])[0] != digests([1, 2, 3, 4 + 256])[0]
    assert len(digests([1, 2, 3])) == 0


def test_match_stops_at_the_first_unknown_block_and_at_the_limit() -> None:
    pool = BlockPool(10)
    prefix = PrefixCache(pool, SIZE)
    names = digests(list(range(16)))
    table = pool.allocate(4)
    for i in (0, 1, 3):
        pool.remember(table[i], names[i])
    assert prefix.match(names, 4) == table[:2]
    assert prefix.match(names, 1) == table[:1]
    assert prefix.match(names, 0) == []


def test_a_block_evicted_in_the_middle_ends_the_match_there() -> None:
    pool = BlockPool(5)
    prefix = PrefixCache(pool, SIZE)
    names = digests(list(range(16)))
    table = pool.allocate(4)
    for block, name in zip(table, names, strict=True):
        pool.remember(block, name)
    pool.free(table)
    pool.allocate(2)
    assert prefix.match(names, 4) == table[:2]


@pytest.mark.parametrize("salt", ["", "key 1"])
def test_a_disabled_cache_names_and_finds_nothing(salt: str) -> None:
    prefix = PrefixCache(BlockPool(5), SIZE, enabled=False)
    out: list[bytes] = []
    prefix.extend(out, array("i", range(16)), 4, salt)
    assert out == []
    assert prefix.match(out, 4) == []
