"""How each matrix product of a decode step runs, by operation, shape and row count: measured, not tuned at run time."""

from __future__ import annotations

import csv
import functools
import io
from importlib.resources import files
from typing import NamedTuple

from tpqwen.kernels.launch import fitting_stages

MAX_ROWS = 256  # of a product that streams its weight; more go to cuBLAS, if not to tiles that were measured
GEMV_ROWS = 4
PLAIN, ADD, SILU = 0, 1, 2  # what a kernel does with the product
NARROWEST = 64  # columns: the smallest block_k, so K must be a multiple of it
SPARED_WIDTH = 2048  # of rows whose norm two products share: with wider ones that saves nothing
PROGRAMS = 132  # multiprocessors of H100 and H200


class Numbers(NamedTuple):
    """Bytes of one number of the activations and of the weight; a weight of one byte is int8."""

    activations: int = 2
    weight: int = 2


BF16 = Numbers()
# Of a configuration in gemm_measured.csv, besides path and fuse_norm.
COLUMNS = ("block_n", "block_k", "warps", "stages", "split", "prefetch", "block_m")


class Config(NamedTuple):
    """How one product runs. path: "gemv" (no tensor cores, 1..4 rows), "dot" (all rows at once), "tile" (block_m of
    them, by TMA) or "torch" (cuBLAS, kernels around it).

    block_n weight rows by block_k columns make a tile. stages: tiles that gemv holds in registers before it waits for
    the previous kernel, or the others' pipeline depth. split: dot programs that share one tile's K. prefetch: columns
    per weight row asked into L2 before the wait. fuse_norm: else rms_norm runs first; it does for "tile".
    """

    path: str
    block_n: int = 0
    block_k: int = 0
    warps: int = 4
    stages: int = 1
    split: int = 1
    prefetch: int = 0
    fuse_norm: bool = True
    block_m: int = 0


Product = tuple[str, int, int, int]  # operation, weight rows, K, bytes of a weight
Table = dict[Product, tuple[tuple[int, Config], ...]]


def _gemv(block_n: int, block_k: int, warps: int, stages: int, prefetch: int = 0) -> Config:
    return Config("gemv", block_n, block_k, warps, stages, prefetch=prefetch)


def _dot(block_n: int, block_k: int, warps: int, stages: int, split: int = 1, prefetch: int = 512) -> Config:
    return Config("dot", block_n, block_k, warps, stages, split, prefetch, fuse_norm=False)


def read_measured(text: str) -> Table:
    """The lines of gemm_measured.csv, one for each product and number of rows: (operation, weight rows, K, bytes of a
    weight) -> (largest number of rows, configuration) ascending."""
    found: dict[Product, list[tuple[int, Config]]] = {}
    for line in csv.DictReader(io.StringIO(text)):
        product = (line["operation"], int(line["weights"]), int(line["width"]), int(line["bytes"]))
        config = Config(line["path"], fuse_norm=line["fuse_norm"] == "1", **{c: int(line[c]) for c in COLUMNS})
        found.setdefault(product, []).append((int(line["rows"]), config))
    return {product: tuple(sorted(entries)) for product, entries in found.items()}


# Written by tools/tune_products.py on an H100: 16-bit weights of all Qwen3's dense sizes on one GPU, int8 ones of two.
TABLE = read_measured(files("tpqwen.kernels").joinpath("gemm_measured.csv").read_text("utf-8"))


def default_config(rows: int, weights: int, width: int, numbers: Numbers = BF16) -> Config:
    """For shapes the table lacks, what its neighbours have in common: `rows` batch rows, `weights` rows of `width`."""
    large = weights * width > 1 << 23
    if numbers.weight == 1:
        return _int8_default(rows, weights, width, large)
    if rows == 1:
        return _gemv(4, 2048, 8, 2) if large else _gemv(2, 1024, 4, 2)
    if rows > 64 or (rows > 32 and large and weights < 8192):
        return Config("torch")
    return _dot(64, 128, 4, 6, _split(weights, width, 64, 256, PROGRAMS // 3))


def _int8_default(rows: int, weights: int, width: int, large: bool) -> Config:
    if rows <= 2:
        return _gemv(4, 1024, 4, 4 if large and rows == 1 else 1)
    if rows <= 16:
        return _dot(32, 256, 4, 4, _split(weights, width, 32, 256, PROGRAMS))
    if rows <= 128:
        return _dot(64, 128, 4, 4, _split(weights, width, 64, 128, PROGRAMS))
    return _dot(64, 128, 4, 3, _split(weights, width, 64, 128, PROGRAMS // 2))


def _split(weights: int, width: int, block_n: int, block_k: int, enough: int) -> int:
    """In how many parts, up to 8, programs share a tile's K so that there are `enough` of them."""
    split = 1
    while split < 8 and -(-weights // block_n) * split < enough and width % (2 * split * block_k) == 0:
        split *= 2
    return split


def tile_widths(block_n: int) -> tuple[int, int]:
    """The power of two in a tile's weight rows and the one beside it, or 0: Triton's blocks have no other sizes."""
    wide = 1 << (block_n.bit_length() - 1)
    return wide, block_n - wide


def padded_rows(config: Config, rows: int) -> int:
    """How many rows activations should have memory for: whole tiles."""
    return -(-rows // config.block_m) * config.block_m if config.path == "tile" else rows


def spares_norm(product: Config, following: Config, hidden: int) -> bool:
    """Whether the norm of rows of `hidden` numbers is shared by the products before and after it (gemm_norm.py): where
    both can, and it was faster."""
    own = product.path in ("dot", "tile") and following.path in ("dot", "tile")
    return own and not following.fuse_norm and hidden <= SPARED_WIDTH


def shared_bytes(config: Config, rows: int, numbers: Numbers = BF16) -> int:
    """Shared memory of a program with a pipeline: its tiles of the weight and of the rows."""
    batch = config.block_m or max(16, 1 << (rows - 1).bit_length())
    row_bytes = config.block_n * numbers.weight + batch * numbers.activations
    return config.stages * row_bytes * config.block_k


def fit(config: Config, rows: int, width: int, numbers: Numbers = BF16) -> Config:
    """The configuration made valid for `rows` batch rows and K = `width`, or the torch path if none is. The table was
    measured for numbers of two bytes; wider ones take fewer stages."""
    too_many = (config.path == "dot" and rows > MAX_ROWS) or (config.path == "gemv" and rows > GEMV_ROWS)
    int8_tile = config.path == "tile" and numbers.weight == 1
    if config.path == "torch" or too_many or int8_tile or width % NARROWEST:
        return Config("torch")
    block_k, split = config.block_k, config.split if config.path == "dot" else 1
    while width % (split * NARROWEST):
        split -= 1
    while (width // split) % block_k:
        block_k //= 2
    tiles = width // split // block_k
    stages = min(config.stages, tiles) if config.path == "gemv" else config.stages
    if config.path != "gemv":
        stages = fitting_stages(stages, shared_bytes(config._replace(block_k=block_k, stages=1), rows, numbers))
    pieces = config.warps * 32 // tile_widths(config.block_n)[0]  # that threads make of a row's columns
    columns = min(config.prefetch, (tiles - stages) * block_k if config.path == "gemv" else tiles * block_k)
    columns -= columns % (pieces * 64) if pieces else columns
    return config._replace(block_k=block_k, split=split, stages=stages, prefetch=columns)


@functools.cache
def choose(operation: str, rows: int, weights: int, width: int, numbers: Numbers = BF16) -> Config:
    """The configuration of "plain", "norm", "silu" or "add" on `rows` rows and a [weights, width] weight.

    Products with and without a residual to add run alike; the one stands in for the other.
    """
    size = 1 if numbers.weight == 1 else 2  # wider numbers run as those that were measured
    names = ("add", "plain") if operation == "add" else ("plain", "add") if operation == "plain" else (operation,)
    measured = next((TABLE[n, weights, width, size] for n in names if (n, weights, width, size) in TABLE), ())
    config = next((c for largest, c in measured if rows <= largest), None)
    if config is not None and config.path == "tile" and numbers.activations > 2:
        return Config("torch")  # tensor cores take no float32
    return fit(config or default_config(rows, weights, width, numbers), rows, width, numbers)
