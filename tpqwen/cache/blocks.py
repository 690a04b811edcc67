"""The pool of KV blocks: reference counts, and an LRU order in which unused blocks stay findable by their hash.

A block is used (some sequence holds it), cached (nobody holds it, its content is still known by hash) or free.
Only ids live here; every rank stores its own heads of a block under the same id.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from tpqwen.errors import ConfigError, EngineError

NULL_BLOCK = 0  # never given out: padding rows on the device may write there


class BlockPool:
    """Blocks 1 .. num_blocks - 1. Every operation is O(1) per block."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 2:
            raise ConfigError(f"the KV cache needs at least 2 blocks (one is the null block), not {num_blocks}")
        self.num_blocks = num_blocks
        self.changes = 0  # grows whenever something that was refused might now be granted
        self._refs = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._free = list(range(num_blocks - 1, NULL_BLOCK, -1))  # a stack, lowest id on top
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def num_usable(self) -> int:
        """All blocks but the null block."""
        return self.num_blocks - 1

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can give out: free ones, and cached ones by forgetting their content."""
        return len(self._free) + len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_usable - len(self._free) - len(self._cached)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """`count` blocks with one reference each. Free ones first, then the least recently used cached ones.

        Raises EngineError when fewer are available: callers ask `num_available` first.
        """
        if count > self.num_available:
            raise EngineError(f"{count} blocks wanted: {self._numbers()}")
        blocks = []
        for _ in range(count):
            block = self._free.pop() if self._free else self._evict()
            self._refs[block] = 1
            blocks.append(block)
        return blocks

    def claim(self, blocks: Iterable[int]) -> None:
        """One more reference to each; they are used or cached, as `find` returned them."""
        for block in blocks:
            if self._refs[block] == 0:
                del self._cached[block]
            self._refs[block] += 1

    def free(self, blocks: Sequence[int]) -> None:
        """Give one reference of each back. A table's end is forgotten before its start, which more will ask for.

        Raises EngineError on a block that nobody holds.
        """
        self.changes += 1
        for block in reversed(blocks):
            if self._refs[block] <= 0:
                raise EngineError(f"block {block} freed twice: {self._numbers()}")
            self._refs[block] -= 1
            if self._refs[block] == 0:
                if self._hash_of[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None

    def find(self, digest: bytes) -> int | None:
        """The block that holds this content, if there is one."""
        return self._block_of.get(digest)

    def remember(self, block: int, digest: bytes) -> None:
        """A used block is full and its content known: let it be found. The first block of equal content wins."""
        if self._hash_of[block] is None and digest not in self._block_of:
            self._hash_of[block] = digest
            self._block_of[digest] = block
            self.changes += 1

    def forget(self, blocks: Iterable[int]) -> None:
        """Let used blocks never be found again (their content is not to be trusted)."""
        for block in blocks:
            digest = self._hash_of[block]
            if digest is not None:
                del self._block_of[digest]
                self._hash_of[block] = None

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Raise EngineError with all numbers unless the books balance and `tables` hold exactly the references."""
        held = Counter(block for table in tables for block in table)
        wrong = [b for b in range(self.num_blocks) if self._refs[b] != held[b]]
        free, cached = set(self._free), set(self._cached)
        hashed = {b for b, digest in enumerate(self._hash_of) if digest is not None}
        problems = {
            f"blocks {wrong[:8]} have other reference counts than the tables": bool(wrong),
            "the null block is held": held[NULL_BLOCK] > 0,
            "a block is listed twice": len(free) != len(self._free) or bool(free & cached),
            "a listed block is held": any(self._refs[b] for b in free | cached),
            "free or cached blocks are mixed up": bool(free & hashed) or not cached <= hashed,
            "used + cached + free != total": sum(n > 0 for n in self._refs) != self.num_used,
            "hashes and blocks do not match": {self._hash_of[b]: b for b in hashed} != self._block_of,
        }
        if broken := [text for text, is_broken in problems.items() if is_broken]:
            raise EngineError(f"block pool: {'; '.join(broken)}: {self._numbers()}")

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        self.forget((block,))
        return block

    def _numbers(self) -> str:
        return (
            f"used {self.num_used} + cached {self.num_cached} + free {self.num_free} of {self.num_usable} blocks, "
            f"{len(self._block_of)} hashes"
        )
