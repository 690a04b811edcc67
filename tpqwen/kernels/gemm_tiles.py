"""Matrix products of 65 to 256 rows, in large tiles that come by TMA: residual add or SwiGLU in the epilogue.

With so many rows what goes from L2 to the multiprocessors is the limit before memory is, and a tile of BLOCK_M by
BLOCK_N brings 1 / BLOCK_M + 1 / BLOCK_N numbers for each multiplication. Large tiles are few, so programs do not own
tiles: the steps over K of all tiles are one sequence, of which each program takes an equal share. Programs that share a
tile leave their parts in the workspace, wait for each other, and add up some of the tile's rows each, in the order of
the steps. They wait only when nobody waits for them any more, so that they need not all run at once.

x [M, K] and the weight come as TMA descriptors; what they hold beyond the matrices is zero. Rows are independent.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from tpqwen.kernels.gemm_shared import SILU, prefetch_weights, weight_rows, workspace
from tpqwen.kernels.gemm_table import Config
from tpqwen.kernels.launch import launch_options, release_next, wait_previous


@triton.jit(do_not_specialize=["M"])
def _tile_kernel(
    x,
    w,
    weight,
    residual,
    out,
    partial,
    arrived,
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PREFETCH: tl.constexpr,
    EPILOGUE: tl.constexpr,
    WARPS: tl.constexpr,
    WAIT: tl.constexpr,
    PDL: tl.constexpr,
):
    """Programs with the same share of the steps, one for each BLOCK_M rows, are neighbours: one of them brings a weight
    from memory, the others find it in L2. w: the weight, for TMA; weight: the same, to be prefetched."""
    release_next(PDL)
    OUT: tl.constexpr = BLOCK_N // 2 if EPILOGUE == 2 else BLOCK_N
    STEPS: tl.constexpr = K // BLOCK_K
    row, share = tl.program_id(0), tl.program_id(1)
    steps, shares = tl.cdiv(N, OUT) * STEPS, tl.num_programs(1)
    begin, end = share * steps // shares, (share + 1) * steps // shares
    if PDL and PREFETCH > 0:
        start = tl.minimum(begin % STEPS * BLOCK_K, K - PREFETCH)
        rows = weight_rows(begin // STEPS, N, BLOCK_N, EPILOGUE)[:, None]
        prefetch_weights(weight, rows, K, start, BLOCK_N, PREFETCH, WARPS)
    wait_previous(PDL)
    for tile in range(begin // STEPS, (end - 1) // STEPS + 1):
        first = tl.maximum(begin - tile * STEPS, 0)
        last = tl.minimum(end - tile * STEPS, STEPS)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for step in tl.range(first, last, num_stages=STAGES):
            values = x.load([row * BLOCK_M, step * BLOCK_K])
            weights = w.load([0, tile * OUT, step * BLOCK_K]).reshape(BLOCK_N, BLOCK_K)
            acc = tl.dot(values, weights.T, acc, input_precision="ieee")
        if last - first == STEPS:
            _finish(acc, residual, out, row * BLOCK_M, tile, M, N, BLOCK_M, BLOCK_N, EPILOGUE)
        else:
            place = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
            tl.store(_part(partial, row, share, tile, steps, STEPS, BLOCK_M * BLOCK_N) + place, acc)
            # All of this program's stores come before the one thread's count; who finds all counted sees every part.
            tl.debug_barrier()
            tl.atomic_add(arrived + tile * tl.num_programs(0) + row, 1, sem="acq_rel")
    # Of the tiles that a share touches only the first and the last are in parts.
    lowest, highest = begin // STEPS, (end - 1) // STEPS
    for tile in range(lowest, highest + 1, tl.maximum(highest - lowest, 1)):
        low = ((tile * STEPS + 1) * shares - 1) // steps  # the share that has the tile's first step
        count = ((tile + 1) * STEPS * shares - 1) // steps - low + 1
        if count > 1:
            _add_up(
                partial, arrived, residual, out, row, share, tile, steps, low, count, M,
                N, BLOCK_M, BLOCK_N, STEPS, EPILOGUE, WARPS, WAIT
            )  # fmt: skip


@triton.jit
def _add_up(
    partial, arrived, residual, out, row, share, tile, steps, low, count, M,
    N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STEPS: tl.constexpr, EPILOGUE: tl.constexpr,
    WARPS: tl.constexpr, WAIT: tl.constexpr
):  # fmt: skip
    """Wait for the tile's `count` parts, of the shares from `low` on, and finish this share's rows of it.

    A counter has the parts that are there, and above them those that nobody of its share reads any more.
    """
    LEFT: tl.constexpr = 1 << 16
    ROWS: tl.constexpr = max(1, min(BLOCK_M, WARPS * 512 // BLOCK_N))  # that are added up at once
    counter = arrived + tile * tl.num_programs(0) + row
    there = tl.atomic_add(counter, 0, sem="acquire") % LEFT
    if WAIT:
        while there < count:
            there = tl.atomic_add(counter, 0, sem="acquire") % LEFT
    # In the interpreter programs run one after another: only the last finds all there, and finishes all.
    begin = share - low if WAIT else tl.where(there == count, 0, BLOCK_M)
    for piece in range(begin, BLOCK_M // ROWS, count if WAIT else 1):
        place = (piece * ROWS + tl.arange(0, ROWS))[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        acc = tl.zeros([ROWS, BLOCK_N], tl.float32)
        for s in range(low, low + count, 4):
            for ahead in tl.static_range(4):  # so many loads are on their way at once
                part = _part(partial, row, s + ahead, tile, steps, STEPS, BLOCK_M * BLOCK_N) + place
                acc += tl.load(part, mask=s + ahead < low + count, other=0.0, cache_modifier=".cg")
        _finish(acc, residual, out, row * BLOCK_M + piece * ROWS, tile, M, N, ROWS, BLOCK_N, EPILOGUE)
    if tl.atomic_add(counter, LEFT, sem="acq_rel") // LEFT == count - 1:
        tl.store(counter, 0)


@triton.jit
def _part(partial, row, share, tile, steps, STEPS: tl.constexpr, FLOATS: tl.constexpr):
    """Where a share's part of a tile is, which is the first or the last that the share touches."""
    second = (share * steps // tl.num_programs(1) // STEPS != tile).to(tl.int32)
    return partial + ((share * tl.num_programs(0) + row) * 2 + second) * FLOATS


@triton.jit
def _finish(
    acc,
    residual,
    out,
    first,
    tile,
    M,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EPILOGUE: tl.constexpr,
):
    """Store complete sums, acc [ROWS, BLOCK_N], of the rows from `first` on; for SwiGLU gates, then what they gate."""
    OUT: tl.constexpr = BLOCK_N // 2 if EPILOGUE == 2 else BLOCK_N
    m = (first + tl.arange(0, ROWS))[:, None]
    n = (tile * OUT + tl.arange(0, OUT))[None, :]
    place, inside = m * N + n, (m < M) & (n < N)
    if EPILOGUE == 1:
        acc += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    if EPILOGUE == 2:
        gate, up = tl.split(tl.permute(tl.reshape(acc, [ROWS, 2, OUT]), (0, 2, 1)))
        acc = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=inside)


def tile_product(
    config: Config,
    epilogue: int,
    x_MK: torch.Tensor,
    matrix: torch.Tensor,
    out_MN: torch.Tensor,
    residual_MN: torch.Tensor,
) -> torch.Tensor:
    """x W^T with the epilogue into out_MN, which may be the residual. All are contiguous and agree, and config has been
    through fit."""
    (rows, width), columns = x_MK.shape, out_MN.shape[1]
    halves = 2 if epilogue == SILU else 1
    block_out = config.block_n // halves
    row_tiles, tiles = triton.cdiv(rows, config.block_m), triton.cdiv(columns, block_out)
    shares = min(config.split, tiles * (width // config.block_k))
    scratch = workspace(x_MK.device)
    parts = 2 * row_tiles * shares if shares != tiles else 0
    assert scratch.fits(row_tiles * tiles, parts, config.block_m * config.block_n), "the product needs more workspace"
    _tile_kernel[(row_tiles, shares)](
        TensorDescriptor.from_tensor(x_MK, [config.block_m, config.block_k]),
        TensorDescriptor.from_tensor(matrix.view(halves, columns, width), [halves, block_out, config.block_k]),
        matrix,
        residual_MN,
        out_MN,
        scratch.partial_V,
        scratch.arrived_N,
        rows,
        N=columns,
        K=width,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        STAGES=config.stages,
        PREFETCH=config.prefetch,
        EPILOGUE=epilogue,
        WARPS=config.warps,
        WAIT=x_MK.device.type == "cuda",
        num_warps=config.warps,
        **launch_options(x_MK.device),
    )
    return out_MN
