"""How each matrix product of a decode step runs, by operation, shape and row count: measured, not tuned at run time."""

from __future__ import annotations

import functools
from typing import NamedTuple

from tpqwen.kernels.launch import fitting_stages

MAX_ROWS = 128  # of one launch of our kernels; more go to cuBLAS
MAX_INT8_ROWS = 256  # likewise, where cuBLAS needs the weight written out first
GEMV_ROWS = 4
GEMV_SUMS = 64  # fp32 of one thread, all rows together, beside twice as many int8 weights as others: more would spill
NARROWEST = 64  # columns: the smallest block_k, so K must be a multiple of it
PROGRAMS = 132  # multiprocessors of H100 and H200


class Numbers(NamedTuple):
    """Bytes of one number of the activations and of the weight; a weight of one byte is int8."""

    activations: int = 2
    weight: int = 2

    @property
    def max_rows(self) -> int:
        """Of one launch of our kernels."""
        return MAX_INT8_ROWS if self.weight == 1 else MAX_ROWS


BF16 = Numbers()


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


def _gemv(block_n: int, block_k: int, warps: int, stages: int, prefetch: int = 0) -> Config:
    return Config("gemv", block_n, block_k, warps, stages, prefetch=prefetch)


def _dot(block_n: int, block_k: int, warps: int, stages: int, split: int = 1, prefetch: int = 512) -> Config:
    return Config("dot", block_n, block_k, warps, stages, split, prefetch, fuse_norm=False)


_CUBLAS = (MAX_ROWS, Config("torch"))

# (operation, weight rows, K): configurations by largest number of rows, ascending; measured on an H100.
TABLE: dict[tuple[str, int, int], tuple[tuple[int, Config], ...]] = {
    # Qwen3-0.6B
    ("norm", 4096, 1024): (
        (1, _gemv(4, 512, 4, 1)),
        (2, _gemv(2, 512, 2, 2)),
        (4, _dot(32, 256, 4, 4)),
        (8, _dot(64, 128, 4, 6, 2)),
        (32, _dot(32, 256, 4, 6)),
        (64, _dot(64, 128, 4, 6, prefetch=0)),
        _CUBLAS,
    ),
    ("add", 1024, 2048): (
        (1, _gemv(2, 1024, 4, 2)),
        (2, _gemv(4, 512, 2, 2, 1024)),
        (16, _dot(32, 256, 4, 6, 4)),
        (32, _dot(64, 256, 8, 3, 4)),
        (64, _dot(64, 128, 8, 6, 4)),
        _CUBLAS,
    ),
    ("silu", 6144, 1024): (
        (1, _gemv(4, 512, 4, 1)),
        (2, _gemv(4, 512, 4, 2)),
        (32, _dot(64, 128, 4, 6)),
        (64, _dot(64, 128, 4, 4)),
        (128, _dot(64, 64, 8, 6)),
    ),
    ("add", 1024, 3072): (
        (1, _gemv(4, 1024, 2, 2, 1024)),
        (2, _gemv(8, 1024, 4, 1, 1024)),
        (16, _dot(64, 256, 4, 4, 4)),
        (64, _dot(64, 128, 8, 6, 4)),
        _CUBLAS,
    ),
    # Qwen3-8B
    ("norm", 6144, 4096): (
        (1, _gemv(2, 1024, 4, 4)),
        (2, _gemv(2, 2048, 4, 2)),
        (64, _dot(64, 128, 4, 6)),
        _CUBLAS,
    ),
    ("add", 4096, 4096): (
        (1, _gemv(2, 2048, 4, 1)),
        (4, _dot(32, 256, 4, 6)),
        (16, _dot(64, 256, 4, 4, prefetch=0)),
        (32, _dot(64, 128, 4, 6, prefetch=0)),
        _CUBLAS,
    ),
    ("silu", 24576, 4096): (
        (1, _gemv(2, 2048, 8, 1)),
        (2, _gemv(8, 512, 2, 1, 1024)),
        (32, _dot(64, 128, 4, 6)),
        (64, _dot(64, 128, 8, 6, prefetch=0)),
        (128, _dot(64, 64, 4, 6, prefetch=0)),
    ),
    ("add", 4096, 12288): (
        (1, _gemv(4, 2048, 8, 4)),
        (4, _dot(32, 256, 4, 6)),
        (16, _dot(64, 256, 4, 4, prefetch=0)),
        (32, _dot(64, 128, 4, 6, prefetch=0)),
        (64, _dot(64, 256, 8, 3, 2)),
        _CUBLAS,
    ),
}


def default_config(rows: int, weights: int, width: int) -> Config:
    """For shapes the table lacks, what its neighbours have in common: `rows` batch rows, `weights` rows of `width`."""
    large = weights * width > 1 << 23
    if rows == 1:
        return _gemv(4, 2048, 8, 2) if large else _gemv(2, 1024, 4, 2)
    if rows > 64 or (rows > 32 and large and weights < 8192):
        return Config("torch")
    split = 1
    while -(-weights // 64) * split < PROGRAMS // 3 and width % (2 * split * 256) == 0:
        split *= 2
    return _dot(64, 128, 4, 6, split)


def int8_config(config: Config, rows: int, weights: int, width: int) -> Config:
    """What `config`, measured for 16-bit weights, becomes for int8 ones, not measured yet: tiles of as many bytes, and
    the dot kernel instead of cuBLAS, for which the weight would have to be written out."""
    if config.path == "torch":
        block_n, warps = (64, 4) if rows <= 64 or weights < 64 * PROGRAMS else (128, 8)
        block_k, split = 128 if rows <= 128 else 64, 1
        while -(-weights // block_n) * split * 2 <= PROGRAMS and width % (4 * split * block_k) == 0:
            split *= 2
        return _dot(block_n, block_k, warps, 4, split)
    if config.path == "gemv":
        sums = rows * config.block_n * config.block_k // (32 * config.warps)
        wider = 2 if 2 * sums <= GEMV_SUMS else 1
        return config._replace(block_k=wider * config.block_k, prefetch=2 * config.prefetch)
    return config._replace(block_k=min(2 * config.block_k, 256), prefetch=2 * config.prefetch)


def shared_bytes(config: Config, rows: int, numbers: Numbers = BF16) -> int:
    """Shared memory of a dot program: its pipeline's tiles of the weight and of the rows."""
    batch = max(16, 1 << (rows - 1).bit_length())
    row_bytes = config.block_n * numbers.weight + batch * numbers.activations
    return config.stages * row_bytes * config.block_k


def fit(config: Config, rows: int, width: int, numbers: Numbers = BF16) -> Config:
    """The configuration made valid for `rows` batch rows and K = `width`, or the torch path if none is. The table was
    measured for numbers of two bytes; wider ones take fewer stages."""
    too_many = rows > numbers.max_rows or (config.path == "gemv" and rows > GEMV_ROWS)
    if config.path == "torch" or too_many or width % NARROWEST:
        return Config("torch")
    block_k, split = config.block_k, config.split if config.path == "dot" else 1
    while width % (split * NARROWEST):
        split -= 1
    while (width // split) % block_k:
        block_k //= 2
    tiles = width // split // block_k
    stages = min(config.stages, tiles) if config.path == "gemv" else config.stages
    if config.path == "dot":
        stages = fitting_stages(stages, shared_bytes(config._replace(block_k=block_k, stages=1), rows, numbers))
    pieces = max(config.warps * 32 // config.block_n, 1) if config.bulk else 1
    columns = min(config.prefetch, (tiles - stages) * block_k if config.path == "gemv" else tiles * block_k)
    columns -= columns % (pieces * 64)
    return config._replace(block_k=block_k, split=split, stages=stages, prefetch=columns)


@functools.cache
def choose(operation: str, rows: int, weights: int, width: int, numbers: Numbers = BF16) -> Config:
    """The configuration of "plain", "norm", "silu" or "add" on `rows` rows and a [weights, width] weight."""
    if rows > numbers.max_rows:
        return Config("torch")
    measured = TABLE.get((operation, weights, width), ())
    config = next((c for largest, c in measured if rows <= largest), None) or default_config(rows, weights, width)
    return fit(int8_config(config, rows, weights, width) if numbers.weight == 1 else config, rows, width, numbers)
