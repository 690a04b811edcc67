"""Matrix products of a decode step with their neighbours fused: RMSNorm before; residual add or SwiGLU after.

T tokens (batch rows), H hidden, I inputs or inner width, O outputs, F = 2I, K the summed width. The kernels stream each
weight once; each asks for the next kernel's launch, starts its own weight loads, and only then waits for its predecessor
(programmatic dependent launch): weights never depend on an earlier kernel. Above 128 rows the products go to cuBLAS.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

PLAIN, ADD, SILU = 0, 1, 2  # what a kernel does with the product
MAX_ROWS = 128  # of one launch; also the last bucket of the table
SMS = 132  # of H100 and H200: only guides default_config


class Config(NamedTuple):
    """How one product runs. path: "gemv" (no tensor cores, 1..4 rows), "dot", or "torch" (cuBLAS and separate kernels).

    block_n weight rows by block_k columns make a tile. stages: gemv tiles held in registers before the wait, dot pipeline
    depth. split: programs that share one tile's K. prefetch: columns per weight row asked into L2 before the wait (0:
    none). fuse_norm: normalize inside the kernel, else run rms_norm first.
    """

    path: str
    block_n: int = 0
    block_k: int = 0
    warps: int = 4
    stages: int = 1
    split: int = 1
    prefetch: int = 0
    fuse_norm: bool = True


class Workspace:
    """Scratch of the split products, at a fixed address so that CUDA graphs may keep it. Used by one stream at a time.

    partial_V fp32 holds unreduced tiles and needs no initial value; arrived_N int32 counts programs per tile, is zero
    between kernels, and is set back to zero by the last program of each tile.
    """

    def __init__(self, device: torch.device, partial_floats: int = 8 << 20, counters: int = 4096) -> None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("the GEMM workspace must exist before a CUDA graph is captured")
        self.partial_V = torch.empty(partial_floats, dtype=torch.float32, device=device)
        self.arrived_N = torch.zeros(counters, dtype=torch.int32, device=device)

    def fits(self, tiles: int, split: int, tile_floats: int) -> bool:
        """Whether `tiles` tiles of `tile_floats` fp32 each, split `split` ways, have room."""
        return tiles <= len(self.arrived_N) and tiles * split * tile_floats <= len(self.partial_V)


@functools.cache
def workspace(device: torch.device) -> Workspace:
    """The device's workspace; made on the first call, which must come before any graph capture."""
    return Workspace(device)


@triton.jit
def prefetch_weights(w, rows, K, start, BLOCK_N: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr):
    """Ask for columns start .. start + COLUMNS of the weight's `rows` [BLOCK_N, 1] to be brought into L2.

    Each thread asks for one piece of one row, so the pieces cover the tile exactly once.
    """
    PIECES: tl.constexpr = WARPS * 32 // BLOCK_N
    piece = tl.arange(0, PIECES)[None, :] * (COLUMNS // PIECES)
    addresses = (w + rows * K + (start + piece)).to(tl.int64, bitcast=True)
    size = tl.full([BLOCK_N, PIECES], COLUMNS // PIECES * (w.dtype.element_ty.primitive_bitwidth // 8), tl.int32)
    tl.inline_asm_elementwise(
        "{ cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r",
        [addresses, size],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def weight_rows(tile, N: tl.constexpr, BLOCK_N: tl.constexpr, EPILOGUE: tl.constexpr):
    """The weight rows of a tile, [BLOCK_N]. For SwiGLU the tile alternates gate row, up row. Rows past N repeat N - 1."""
    r = tl.arange(0, BLOCK_N)
    if EPILOGUE == 2:
        n = tile * (BLOCK_N // 2) + r // 2
        if N % (BLOCK_N // 2) != 0:
            n = tl.minimum(n, N - 1)
        return n + (r % 2) * N
    n = tile * BLOCK_N + r
    if N % BLOCK_N != 0:
        n = tl.minimum(n, N - 1)
    return n


@triton.jit
def _gemv_kernel(
    x,
    w,
    norm,
    residual,
    out,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
    PREFETCH: tl.constexpr,
    NORM: tl.constexpr,
    EPILOGUE: tl.constexpr,
    WARPS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    tile = tl.program_id(0)
    k = tl.arange(0, BLOCK_K)[None, :]
    rows = weight_rows(tile, N, BLOCK_N, EPILOGUE)[:, None]
    w_tile = w + rows * K + k
    held = ()
    scales = ()
    for t in tl.static_range(EARLY):
        held = held + (tl.load(w_tile + t * BLOCK_K, eviction_policy="evict_first"),)
        if NORM:
            scales = scales + (tl.load(norm + t * BLOCK_K + k),)
    if PDL:
        if PREFETCH > 0:
            prefetch_weights(w, rows, K, EARLY * BLOCK_K, BLOCK_N, PREFETCH, WARPS)
        gdc_wait()
    acc0 = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    acc1, acc2, acc3 = acc0, acc0, acc0
    square0 = tl.zeros([1, BLOCK_K], tl.float32)
    square1, square2, square3 = square0, square0, square0
    for t in tl.static_range(K // BLOCK_K):
        if t < EARLY:
            weights = held[t].to(tl.float32)
        else:
            weights = tl.load(w_tile + t * BLOCK_K, eviction_policy="evict_first").to(tl.float32)
        if NORM:
            if t < EARLY:
                scale = scales[t].to(tl.float32)
            else:
                scale = tl.load(norm + t * BLOCK_K + k).to(tl.float32)
        for m in tl.static_range(ROWS):
            value = tl.load(x + m * K + t * BLOCK_K + k, eviction_policy="evict_last").to(tl.float32)
            square = value * value
            if NORM:
                value = value * scale
            if m == 0:
                acc0 += weights * value
                square0 += square
            elif m == 1:
                acc1 += weights * value
                square1 += square
            elif m == 2:
                acc2 += weights * value
                square2 += square
            else:
                acc3 += weights * value
                square3 += square
    _store_row(acc0, square0, residual, out, eps, tile, 0, N, K, BLOCK_N, NORM, EPILOGUE)
    if ROWS > 1:
        _store_row(acc1, square1, residual, out, eps, tile, 1, N, K, BLOCK_N, NORM, EPILOGUE)
    if ROWS > 2:
        _store_row(acc2, square2, residual, out, eps, tile, 2, N, K, BLOCK_N, NORM, EPILOGUE)
    if ROWS > 3:
        _store_row(acc3, square3, residual, out, eps, tile, 3, N, K, BLOCK_N, NORM, EPILOGUE)


@triton.jit
def _store_row(
    acc,
    square,
    residual,
    out,
    eps,
    tile,
    m,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NORM: tl.constexpr,
    EPILOGUE: tl.constexpr,
):
    """Finish row m of a gemv tile: acc [BLOCK_N, BLOCK_K] and square [1, BLOCK_K] are sums still spread over K."""
    OUT: tl.constexpr = BLOCK_N // 2 if EPILOGUE == 2 else BLOCK_N
    n = tile * OUT + tl.arange(0, OUT)
    inside = n < N
    if EPILOGUE == 1:
        before = tl.load(residual + m * N + n, mask=inside, other=0.0).to(tl.float32)
    y = tl.sum(acc, axis=1)
    if NORM:
        y = y * tl.rsqrt(tl.sum(tl.sum(square, axis=1), axis=0) / K + eps)
    if EPILOGUE == 1:
        y = y + before
    if EPILOGUE == 2:
        gate, up = tl.split(tl.reshape(y, [OUT, 2]))
        y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + m * N + n, y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M"])
def _dot_kernel(
    x,
    w,
    norm,
    residual,
    out,
    partial,
    arrived,
    M,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    PREFETCH: tl.constexpr,
    NORM: tl.constexpr,
    EPILOGUE: tl.constexpr,
    WARPS: tl.constexpr,
    PDL: tl.constexpr,
):
    """acc = W tile @ x^T: weight rows are the long side of the tensor-core tile, the batch its short side."""
    if PDL:
        gdc_launch_dependents()
    tile = tl.program_id(0)
    split = tl.program_id(1)
    first = split * (K // SPLIT)
    rows = weight_rows(tile, N, BLOCK_N, EPILOGUE)[:, None]
    if PDL:
        if PREFETCH > 0:
            prefetch_weights(w, rows, K, first, BLOCK_N, PREFETCH, WARPS)
        gdc_wait()
    m = tl.arange(0, BLOCK_M)
    k = first + tl.arange(0, BLOCK_K)[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    square = tl.zeros([BLOCK_M], tl.float32)
    for step in range(0, K // SPLIT, BLOCK_K):
        weights = tl.load(w + rows * K + (step + k), eviction_policy="evict_first")
        values = tl.load(x + m[:, None] * K + (step + k), mask=m[:, None] < M, other=0.0)
        if NORM:
            wide = values.to(tl.float32)
            square += tl.sum(wide * wide, axis=1)
            values = (wide * tl.load(norm + step + k).to(tl.float32)).to(values.dtype)
        acc = tl.dot(weights, tl.trans(values), acc, input_precision="ieee")
    if SPLIT == 1:
        _store_tile(acc, square, residual, out, M, eps, tile, N, K, BLOCK_M, BLOCK_N, NORM, EPILOGUE)
    else:
        n = tl.arange(0, BLOCK_N)
        place = n[:, None] * BLOCK_M + m[None, :]
        squares = partial + tl.num_programs(0) * SPLIT * BLOCK_N * BLOCK_M
        tl.store(partial + (tile * SPLIT + split) * BLOCK_N * BLOCK_M + place, acc)
        if NORM:
            tl.store(squares + (tile * SPLIT + split) * BLOCK_M + m, square)
        # All of this program's stores come before the one thread's count; the last to count sees every partial sum.
        tl.debug_barrier()
        count = tl.atomic_add(arrived + tile, 1, sem="acq_rel")
        if count == SPLIT - 1:
            acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            square = tl.zeros([BLOCK_M], tl.float32)
            for s in tl.static_range(SPLIT):
                acc += tl.load(partial + (tile * SPLIT + s) * BLOCK_N * BLOCK_M + place, cache_modifier=".cg")
                if NORM:
                    square += tl.load(squares + (tile * SPLIT + s) * BLOCK_M + m, cache_modifier=".cg")
            _store_tile(acc, square, residual, out, M, eps, tile, N, K, BLOCK_M, BLOCK_N, NORM, EPILOGUE)
            tl.store(arrived + tile, 0)


@triton.jit
def _store_tile(
    acc,
    square,
    residual,
    out,
    M,
    eps,
    tile,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NORM: tl.constexpr,
    EPILOGUE: tl.constexpr,
):
    """Finish a dot tile: acc [BLOCK_N, BLOCK_M] complete sums, square [BLOCK_M] the rows' sums of squares."""
    OUT: tl.constexpr = BLOCK_N // 2 if EPILOGUE == 2 else BLOCK_N
    n = (tile * OUT + tl.arange(0, OUT))[:, None]
    m = tl.arange(0, BLOCK_M)[None, :]
    place = m * N + n
    inside = (n < N) & (m < M)
    if NORM:
        acc = acc * tl.rsqrt(square / K + eps)[None, :]
    if EPILOGUE == 1:
        acc = acc + tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    if EPILOGUE == 2:
        gate, up = tl.split(tl.permute(tl.reshape(acc, [OUT, 2, BLOCK_M]), (0, 2, 1)))
        acc = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=inside)
