"""What the product kernels share: scratch for tiles that several programs sum, and weights asked for ahead of time."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

PLAIN, ADD, SILU = 0, 1, 2  # what a kernel does with the product


class Workspace:
    """Scratch of the split products, at a fixed address so that CUDA graphs may keep it. Used by one stream at a time.

    partial_V fp32 holds unreduced tiles and needs no initial value; arrived_N int32 counts programs per tile, is zero
    between kernels, and is set back to zero by the last program of each tile.
    """

    def __init__(self, device: torch.device, partial_floats: int = 9 << 20, counters: int = 4096) -> None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("the GEMM workspace must exist before a CUDA graph is captured")
        self.partial_V = torch.empty(partial_floats, dtype=torch.float32, device=device)
        self.arrived_N = torch.zeros(counters, dtype=torch.int32, device=device)

    def fits(self, tiles: int, parts: int, part_floats: int) -> bool:
        """Whether `parts` unreduced tiles of `part_floats` fp32 each have room, and `tiles` counters."""
        return tiles <= len(self.arrived_N) and parts * part_floats <= len(self.partial_V)


@functools.cache
def workspace(device: torch.device) -> Workspace:
    """The device's workspace; made on the first call, which must come before any graph capture."""
    return Workspace(device)


@triton.jit
def prefetch_weights(w, rows, K, start, BLOCK_N: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr):
    """Ask for columns start .. start + COLUMNS of the weight's `rows` [BLOCK_N, 1] to be brought into L2."""
    # One piece of one row per thread, so that the pieces cover the tile exactly once.
    PIECES: tl.constexpr = WARPS * 32 // BLOCK_N
    pieces = w + rows * K + (start + tl.arange(0, PIECES)[None, :] * (COLUMNS // PIECES))
    size = tl.full([BLOCK_N, PIECES], COLUMNS // PIECES * (w.dtype.element_ty.primitive_bitwidth // 8), tl.int32)
    tl.inline_asm_elementwise(
        "{ cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r",
        [pieces.to(tl.int64), size],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def weight_rows(tile, N: tl.constexpr, BLOCK_N: tl.constexpr, EPILOGUE: tl.constexpr):
    """The weight rows of a tile, [BLOCK_N]; for SwiGLU gate row, up row in turn. Rows past N repeat N - 1."""
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
