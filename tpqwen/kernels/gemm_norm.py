"""The RMSNorm between two products without a kernel of its own: the one before it and the one after it share the work.

norm(h) W^T = ((h * g) W^T) / rms(h), row by row, with the norm's weights g. The product that makes h has a tile of it
in registers and also stores h * g, rounded once, and the sums of squares of its piece of each row. The product that
follows takes h * g for its rows, adds up their P pieces and divides its fp32 sums by rms.

T or M rows, N outputs of the first product, which the second one sums over as K. NORM, what a kernel does: 0 nothing,
1 all of the norm of its own rows, 2 its rows are scaled and it divides, 3 it scales what it makes for the next norm.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from tpqwen.kernels.context import Scaled


class NormUse(NamedTuple):
    """What a product's kernel has to do with norms: NORM, and what it needs for that."""

    mode: int = 0
    weight_H: torch.Tensor | None = None
    eps: float = 0.0
    scaled: Scaled | None = None

    @classmethod
    def inside(cls, weight_K: torch.Tensor, eps: float) -> NormUse:
        """The kernel norms its rows itself."""
        return cls(1, weight_K, eps)

    @classmethod
    def before(cls, scaled: Scaled, eps: float) -> NormUse:
        """Its rows are scaled; it divides by their rms."""
        return cls(2, None, eps, scaled)

    @classmethod
    def after(cls, scaled: Scaled, weight_N: torch.Tensor) -> NormUse:
        """It also scales its rows, by the next norm's weights."""
        return cls(3, weight_N, scaled=scaled)

    @property
    def pieces(self) -> int:
        """Of each row whose squares are to be added up."""
        return len(self.scaled.squares_PT) if self.mode == 2 and self.scaled is not None else 0

    def tensors(self, unused: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The norm's weights, scaled rows and squares, `unused` for what there is not."""
        scale = unused if self.weight_H is None else self.weight_H
        return scale, *((unused, unused) if self.scaled is None else self.scaled)


NO_NORM = NormUse()


@triton.jit
def next_scales(norm, n, NORM: tl.constexpr):
    """The next norm's weights of columns n, which like all weights may be read early."""
    scales = tl.zeros([1], tl.float32)
    if NORM == 3:
        scales = tl.load(norm + n)
    return scales


@triton.jit
def load_squares(squares, m, M, NORM: tl.constexpr, PIECES: tl.constexpr):
    """The sums of squares of rows m, [PIECES or more, rows]: begun before the product and added up after it, so that
    nothing waits for them."""
    pieces = tl.zeros([1, 1], tl.float32)
    if NORM == 2:
        p = tl.arange(0, triton.next_power_of_2(PIECES))[:, None]
        pieces = tl.load(squares + p * M + m[None, :], mask=(p < PIECES) & (m[None, :] < M), other=0.0)
    return pieces


@triton.jit
def sum_squares(pieces, square, NORM: tl.constexpr):
    """Of whole rows: the sum of their pieces, or the kernel's own, which it has from the rows themselves."""
    if NORM == 2:
        square = tl.sum(pieces, axis=0)
    return square


@triton.jit
def store_scaled(
    rounded,
    next_scale,
    scaled,
    squares,
    M,
    tile,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NORM: tl.constexpr,
):
    """For the next norm: a tile of its rows, [BLOCK_N, BLOCK_M], times its weights, and the tile's sums of squares."""
    if NORM == 3:
        n = (tile * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
        m = tl.arange(0, BLOCK_M)
        wide = tl.where(n < N, rounded.to(tl.float32), 0.0)
        values = (wide * next_scale[:, None].to(tl.float32)).to(scaled.dtype.element_ty)
        tl.store(scaled + m[None, :] * N + n, values, mask=(n < N) & (m[None, :] < M))
        store_squares(squares, tl.sum(wide * wide, axis=0), tile, m, M)


@triton.jit
def store_squares(squares, square, piece, m, M):
    """One piece of each of rows m."""
    tl.store(squares + piece * M + m, square, mask=m < M)
