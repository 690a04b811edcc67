"""How each matrix product of a decode step runs, by operation, shape and row count: measured, not tuned at run time."""

from __future__ import annotations

import functools
from typing import NamedTuple

MAX_ROWS = 128  # of one launch of our kernels; more go to cuBLAS
GEMV_ROWS = 4
NARROWEST = 64  # columns: the smallest block_k, so K must be a multiple of it
PROGRAMS = 132  # multiprocessors of H100 and H200


class Config(NamedTuple):
    """How one product runs. path: "gemv" (no tensor cores, 1..4 rows), "dot" or "torch" (cuBLAS, kernels around it).

    block_n weight rows by block_k columns make a tile. stages: tiles that gemv holds in registers before it waits for
    the previous kernel, or dot's pipeline depth. split: programs that share one tile's K. prefetch: columns per weight
    row asked into L2 before the wait, by bulk copies or line by line. fuse_norm: else rms_norm runs first.
    """

    path: str
    block_n: int = 0
    block_k: int = 0
    warps: int = 4
    stages: int = 1
    split: int = 1
    prefetch: int = 0
    bulk: bool = True
    fuse_norm: bool = True


# (operation, weight rows, K): configurations by largest number of rows, ascending; measured on an H200.
TABLE: dict[tuple[str, int, int], tuple[tuple[int, Config], ...]] = {}


def default_config(rows: int, weights: int, width: int) -> Config:
    """A guess for shapes the table lacks: `rows` batch rows, `weights` weight rows of `width` columns."""
    if rows == 1:
        return Config("gemv", 2 if weights <= 2048 else 4, 2048 if width >= 4096 else 1024, stages=3)
    if rows > 64:
        return Config("torch")  # cuBLAS until measured otherwise
    tiles = -(-weights // 64)
    split = 1
    while tiles * split < PROGRAMS * 3 // 4 and width // (2 * split) >= 256 and width % (2 * split * NARROWEST) == 0:
        split *= 2
    piece = width // split
    return Config("dot", 64, 128 if rows <= 32 else 64, 4, stages=4, split=split, prefetch=min(piece, 1024))


def fit(config: Config, rows: int, width: int) -> Config:
    """The configuration made valid for `rows` batch rows and K = `width`, or the torch path if none is."""
    if config.path == "torch" or rows > MAX_ROWS or width % NARROWEST or (config.path == "gemv" and rows > GEMV_ROWS):
        return Config("torch")
    block_k, split = config.block_k, config.split if config.path == "dot" else 1
    while width % (split * NARROWEST):
        split -= 1
    while (width // split) % block_k:
        block_k //= 2
    tiles = width // split // block_k
    stages = min(config.stages, tiles) if config.path == "gemv" else config.stages
    pieces = max(config.warps * 32 // config.block_n, 1) if config.bulk else 1
    columns = min(config.prefetch, (tiles - stages) * block_k if config.path == "gemv" else tiles * block_k)
    columns -= columns % (pieces * 64)
    return config._replace(block_k=block_k, split=split, stages=stages, prefetch=columns)


@functools.cache
def choose(operation: str, rows: int, weights: int, width: int) -> Config:
    """The configuration of "plain", "norm", "silu" or "add" on `rows` rows and a [weights, width] weight."""
    if rows > MAX_ROWS:
        return Config("torch")
    for largest, config in TABLE.get((operation, weights, width), ()):
        if rows <= largest:
            return fit(config, rows, width)
    return fit(default_config(rows, weights, width), rows, width)
