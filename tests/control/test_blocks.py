"""BlockPool: against a naive model under random operations, and its refusals."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tpqwen.cache.blocks import NULL_BLOCK, BlockPool
from tpqwen.errors import ConfigError, EngineError

NUM_BLOCKS = 9


class PoolMachine(RuleBasedStateMachine):
    """Tables of sequences that allocate, share, append, register, free and distrust blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.tables: list[list[int]] = []
        self.names: dict[int, bytes] = {}  # content of blocks that may be found: the model's copy
        self.lru: list[int] = []  # cached blocks, the next victim first
        self.counter = 0

    def _taken(self, blocks: list[int]) -> None:
        """Model of allocation: free blocks first, then exactly the least recently used cached ones."""
        evicted = [b for b in blocks if b in self.lru]
        assert evicted == self.lru[: len(evicted)]
        self.lru = self.lru[len(evicted) :]
        for block in evicted:
            del self.names[block]

    @rule(count=st.integers(0, 4))
    def allocate(self, count: int) -> None:
        if count > self.pool.num_available:
            with pytest.raises(EngineError, match=f"{count} blocks wanted: used"):
                self.pool.allocate(count)
            return
        blocks = self.pool.allocate(count)
        assert NULL_BLOCK not in blocks
        assert not set(blocks) & {b for t in self.tables for b in t}
        self._taken(blocks)
        self.tables.append(blocks)

    @precondition(lambda self: self.tables and self.pool.num_available)
    @rule(data=st.data())
    def append(self, data: st.DataObject) -> None:
        blocks = self.pool.allocate(1)
        self._taken(blocks)
        data.draw(st.sampled_from(self.tables)).extend(blocks)

    @precondition(lambda self: any(self.tables))
    @rule(data=st.data(), twin=st.booleans())
    def remember(self, data: st.DataObject, twin: bool) -> None:
        block = data.draw(st.sampled_from([b for t in self.tables for b in t]))
        self.counter += 1
        name = next(iter(self.names.values())) if twin and self.names else str(self.counter).encode()
        self.pool.remember(block, name)
        if block not in self.names and name not in self.names.values():
            self.names[block] = name

    @precondition(lambda self: self.names)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(self.names)))
        assert self.pool.find(self.names[block]) == block
        self.pool.claim([block])
        if block in self.lru:
            self.lru.remove(block)
        self.tables.append([block])

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), trusted=st.booleans())
    def free(self, data: st.DataObject, trusted: bool) -> None:
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        if not trusted:
            self.pool.forget(table)
            for block in table:
                self.names.pop(block, None)
        self.pool.free(table)
        held = {b for t in self.tables for b in t}
        self.lru += [b for b in reversed(table) if b not in held and b in self.names]

    @invariant()
    def books_balance(self) -> None:
        self.pool.check(self.tables)
        held = {b for t in self.tables for b in t}
        assert (self.pool.num_used, self.pool.num_cached) == (len(held), len(self.lru))
        assert self.pool.num_used + self.pool.num_cached + self.pool.num_free == NUM_BLOCKS - 1
        for block, name in self.names.items():
            assert self.pool.find(name) == block

    def teardown(self) -> None:
        for table in self.tables:
            self.pool.free(table)
        assert self.pool.num_used == 0


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, derandomize=True, deadline=None, database=None)


def test_freeing_twice_is_refused_with_all_numbers() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    pool.free(blocks)
    with pytest.raises(EngineError, match=r"block 2 freed twice: used 0 \+ cached 0 \+ free 3 of 3 blocks, 0 hashes"):
        pool.free(blocks)


def test_a_pool_of_only_the_null_block_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 2 blocks"):
        BlockPool(1)


def test_check_names_a_table_that_holds_blocks_it_does_not_own() -> None:
    pool = BlockPool(5)
    blocks = pool.allocate(2)
    pool.check([blocks])
    with pytest.raises(EngineError, match=r"blocks \[1\] have other reference counts.*used 2 .* free 2 of 4"):
        pool.check([blocks, blocks[:1]])
    with pytest.raises(EngineError, match="null block is held"):
        pool.check([blocks, [NULL_BLOCK]])


def test_the_end_of_a_freed_table_is_evicted_before_its_start() -> None:
    pool = BlockPool(4)
    table = pool.allocate(3)
    for block in table:
        pool.remember(block, bytes([block]))
    pool.free(table)
    assert [pool.allocate(1)[0] for _ in range(3)] == table[::-1]


def test_a_forgotten_block_is_not_cached_when_freed() -> None:
    pool = BlockPool(3)
    table = pool.allocate(1)
    pool.remember(table[0], b"x")
    pool.forget(table)
    pool.free(table)
    assert pool.find(b"x") is None
    assert (pool.num_cached, pool.num_free) == (0, 2)
