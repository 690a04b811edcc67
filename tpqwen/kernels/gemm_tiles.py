"""Matrix products of 65 rows and more, in large tiles that come by TMA: residual add or SwiGLU in the epilogue.

With so many rows what goes from L2 to the multiprocessors is a limit as well as memory: for each multiplication a tile
of BLOCK_M by BLOCK_N brings 1 / BLOCK_M + 1 / BLOCK_N numbers. Each program has one tile, over all of K: parts of tiles
that somebody has to add up cost more than multiprocessors without a tile. So that few of these are left, there are
widths between the powers of two that Triton has, put together from two.

M activation rows, N outputs, K the summed width. x [M, K] and the weight, [2, N, K] for SwiGLU, else [1, N, K], come by
TMA descriptors; what lies beyond them is zero or, of rows, not stored. Rows are independent.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from tpqwen.kernels.gemm_norm import NO_NORM, NormUse, load_squares, store_squares, sum_squares
from tpqwen.kernels.gemm_table import SILU, Config, padded_rows, tile_widths
from tpqwen.kernels.launch import launch_options, prefetch_weights, release_next, wait_previous


@triton.jit(do_not_specialize=["M"])
def _tile_kernel(
    x,
    w,
    w_more,
    weight,
    residual,
    out,
    norm,
    scaled,
    squares,
    M,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WIDE: tl.constexpr,
    NARROW: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PREFETCH: tl.constexpr,
    NORM: tl.constexpr,
    PIECES: tl.constexpr,
    EPILOGUE: tl.constexpr,
    WARPS: tl.constexpr,
    PDL: tl.constexpr,
):
    """WIDE rows of the weight, and after them NARROW more, which may be none. w and w_more: the weight for TMA, in
    tiles of either width; weight: the same, to be prefetched.

    Programs with the same weights, one for each BLOCK_M rows, are neighbours: one of them brings a weight from memory,
    the others find it in L2.
    """
    release_next(PDL)
    HALVES: tl.constexpr = 2 if EPILOGUE == 2 else 1
    row = tl.program_id(0) * BLOCK_M
    n = tl.program_id(1) * ((WIDE + NARROW) // HALVES)
    n_more = n + WIDE // HALVES
    if PDL and PREFETCH > 0:
        prefetch_weights(weight, _rows(n, N, WIDE, HALVES)[:, None], K, 0, WIDE, PREFETCH, WARPS)
        if NARROW > 0:
            prefetch_weights(weight, _rows(n_more, N, NARROW, HALVES)[:, None], K, 0, NARROW, PREFETCH, WARPS)
    wait_previous(PDL)
    m = row + tl.arange(0, BLOCK_M)
    pieces = load_squares(squares, m, M, NORM, PIECES)
    acc = tl.zeros([BLOCK_M, WIDE], tl.float32)
    more = tl.zeros([BLOCK_M, max(NARROW, 1)], tl.float32)
    for step in tl.range(0, K // BLOCK_K, num_stages=STAGES):
        k = step * BLOCK_K
        values = x.load([row, k])
        acc = tl.dot(values, w.load([0, n, k]).reshape(WIDE, BLOCK_K).T, acc, input_precision="ieee")
        if NARROW > 0:
            weights = w_more.load([0, n_more, k]).reshape(NARROW, BLOCK_K)
            more = tl.dot(values, weights.T, more, input_precision="ieee")
    square = tl.zeros([BLOCK_M], tl.float32)
    if NORM == 2:
        rms = tl.rsqrt(sum_squares(pieces, square, NORM) / K + eps)[:, None]
        acc *= rms
        more *= rms
    square += _finish(acc, residual, out, norm, scaled, m, n, M, N, BLOCK_M, WIDE, NORM, EPILOGUE)
    if NARROW > 0:
        square += _finish(more, residual, out, norm, scaled, m, n_more, M, N, BLOCK_M, NARROW, NORM, EPILOGUE)
    if NORM == 3:
        store_squares(squares, square, tl.program_id(1), m, M)


@triton.jit
def _rows(n, N: tl.constexpr, WIDTH: tl.constexpr, HALVES: tl.constexpr):
    """The weight's rows [WIDTH] of the columns from n on: for SwiGLU gates, then ups. Past the last it is the last."""
    r = tl.arange(0, WIDTH)
    return tl.minimum(r // (WIDTH // HALVES) * N + n + r % (WIDTH // HALVES), HALVES * N - 1)


@triton.jit
def _finish(
    acc,
    residual,
    out,
    norm,
    scaled,
    m,
    column,
    M,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WIDTH: tl.constexpr,
    NORM: tl.constexpr,
    EPILOGUE: tl.constexpr,
):
    """Store complete sums, acc [BLOCK_M, WIDTH], of rows m from a column on; for SwiGLU they are gates, then ups. Gives
    their sums of squares, [BLOCK_M], if the next norm wants them."""
    OUT: tl.constexpr = WIDTH // 2 if EPILOGUE == 2 else WIDTH
    n = (column + tl.arange(0, OUT))[None, :]
    place, inside = m[:, None] * N + n, (m[:, None] < M) & (n < N)
    if NORM == 3:
        scale = tl.load(norm + n, mask=n < N, other=0.0).to(tl.float32)
    if EPILOGUE == 1:
        acc += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    if EPILOGUE == 2:
        gate, up = tl.split(tl.permute(tl.reshape(acc, [BLOCK_M, 2, OUT]), (0, 2, 1)))
        acc = gate / (1.0 + tl.exp(-gate)) * up
    rounded = acc.to(out.dtype.element_ty)
    tl.store(out + place, rounded, mask=inside)
    square = tl.zeros([BLOCK_M], tl.float32)
    if NORM == 3:
        wide = tl.where(n < N, rounded.to(tl.float32), 0.0)
        tl.store(scaled + place, (wide * scale).to(scaled.dtype.element_ty), mask=inside)
        square = tl.sum(wide * wide, axis=1)
    return square


def tile_product(
    config: Config,
    epilogue: int,
    x_MK: torch.Tensor,
    matrix: torch.Tensor,
    out_MN: torch.Tensor,
    residual_MN: torch.Tensor,
    norm: NormUse = NO_NORM,
) -> torch.Tensor:
    """x W^T with the epilogue into out_MN, which may be the residual. All are contiguous and agree, and config has been
    through fit."""
    assert norm.mode != 1, "tiles have no norm of their own"
    (rows, width), columns = x_MK.shape, out_MN.shape[1]
    halves = 2 if epilogue == SILU else 1
    wide, narrow = tile_widths(config.block_n)
    weights = matrix.view(halves, columns, width)
    if x_MK.is_cuda:  # what the interpreter is given must be numbers
        x_MK = whole_tiles(x_MK, config)
    _tile_kernel[(triton.cdiv(rows, config.block_m), triton.cdiv(columns * halves, config.block_n))](
        TensorDescriptor.from_tensor(x_MK, [config.block_m, config.block_k]),
        TensorDescriptor.from_tensor(weights, [halves, wide // halves, config.block_k]),
        TensorDescriptor.from_tensor(weights, [halves, (narrow or wide) // halves, config.block_k]),
        matrix,
        residual_MN,
        out_MN,
        *norm.tensors(out_MN),
        rows,
        norm.eps,
        N=columns,
        K=width,
        BLOCK_M=config.block_m,
        WIDE=wide,
        NARROW=narrow,
        BLOCK_K=config.block_k,
        STAGES=config.stages,
        PREFETCH=config.prefetch,
        NORM=norm.mode,
        PIECES=norm.pieces,
        EPILOGUE=epilogue,
        WARPS=config.warps,
        num_warps=config.warps,
        **launch_options(x_MK.device),
    )
    return out_MN


def whole_tiles(x_MK: torch.Tensor, config: Config) -> torch.Tensor:
    """x and what its memory has after it, up to whole tiles: TMA is slow with rows that a matrix does not have."""
    rows, width = x_MK.shape
    room = (x_MK.untyped_storage().nbytes() // x_MK.itemsize - x_MK.storage_offset()) // width
    return x_MK.as_strided((min(room, padded_rows(config, rows)), width), (width, 1))
