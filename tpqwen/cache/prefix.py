"""Finding blocks by what they hold: each full block is named by a hash chained over everything before it.

digest = SHA-256(parent digest + int32 token ids); the parent of the first block is the digest of the salt, so that
equal prompts under different salts never meet. 256 bits make a collision infeasible even for a user who searches for
one, so a hit is believed without comparing tokens.
"""

from __future__ import annotations

from array import array
from hashlib import sha256

from tpqwen.cache.blocks import BlockPool


class PrefixCache:
    """Names blocks and looks them up in the pool, which owns the names. Disabled, it names and finds nothing."""

    def __init__(self, pool: BlockPool, block_size: int, *, enabled: bool = True) -> None:
        self._pool = pool
        self._block_size = block_size
        self._enabled = enabled

    def extend(self, digests: list[bytes], tokens: array[int], num_blocks: int, salt: str) -> None:
        """Append digests until the first `num_blocks` blocks of `tokens` have theirs. About 1 us each."""
        if not self._enabled:
            return
        parent = digests[-1] if digests else sha256(b"tpqwen prefix " + salt.encode()).digest()
        size = self._block_size
        for start in range(len(digests) * size, num_blocks * size, size):
            parent = sha256(parent + tokens[start : start + size].tobytes()).digest()
            digests.append(parent)

    def match(self, digests: list[bytes], limit: int) -> list[int]:
        """Blocks of the longest known prefix, at most `limit`. The caller claims them."""
        blocks = []
        for digest in digests[:limit]:
            block = self._pool.find(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks
