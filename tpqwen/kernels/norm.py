"""RMSNorm and SwiGLU as kernels of their own, for the products that go to cuBLAS.

T tokens, H hidden, I inner width, F = 2I. One program per row; the row stays in registers.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tpqwen.kernels.launch import launch_options, release_next, wait_previous


@triton.jit
def _rms_norm_kernel(x, norm, out, eps, H, WIDTH: tl.constexpr, PDL: tl.constexpr):
    release_next(PDL)
    row = tl.program_id(0).to(tl.int64) * H
    h = tl.arange(0, WIDTH)
    inside = h < H
    scale = tl.load(norm + h, mask=inside, other=0.0)
    wait_previous(PDL)
    value = tl.load(x + row + h, mask=inside, other=0.0)
    wide = value.to(tl.float32)
    normed = (wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / H + eps)).to(value.dtype)
    tl.store(out + row + h, (normed.to(tl.float32) * scale.to(tl.float32)).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _silu_mul_kernel(gate_up, out, INNER, BLOCK: tl.constexpr, PDL: tl.constexpr):
    release_next(PDL)
    wait_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < INNER
    gate = tl.load(gate_up + row * 2 * INNER + i, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + (row * 2 + 1) * INNER + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * INNER + i, (gate / (1.0 + tl.exp(-gate)) * up).to(out.dtype.element_ty), mask=inside)


def _row_warps(width: int) -> int:
    """Enough threads that each holds at most 16 elements, at most 16 warps."""
    return max(1, min(16, width // 512))


def rms_norm(
    x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float, *, out_TH: torch.Tensor | None = None
) -> torch.Tensor:
    """x / rms(x) * weight over the last axis of contiguous x_TH [..., H], rounded where the reference rounds.

    out_TH may be x_TH itself.
    """
    assert x_TH.is_contiguous(), "rms_norm takes contiguous rows"
    out_TH = torch.empty_like(x_TH) if out_TH is None else out_TH
    hidden = x_TH.shape[-1]
    if x_TH.numel():
        width = triton.next_power_of_2(hidden)
        grid = (x_TH.numel() // hidden,)
        options = {"num_warps": _row_warps(width), **launch_options(x_TH.device)}
        _rms_norm_kernel[grid](x_TH, weight_H, out_TH, eps, hidden, width, **options)
    return out_TH


def silu_mul(gate_up_TF: torch.Tensor, *, out_TI: torch.Tensor | None = None) -> torch.Tensor:
    """silu(gate) * up, [T, I]: contiguous gate_up_TF rows hold I gates, then I ups. One rounding at the end."""
    assert gate_up_TF.is_contiguous(), "silu_mul takes contiguous rows"
    tokens, inner = gate_up_TF.shape[0], gate_up_TF.shape[1] // 2
    out_TI = gate_up_TF.new_empty(tokens, inner) if out_TI is None else out_TI
    if tokens:
        grid = (tokens, triton.cdiv(inner, 1024))
        _silu_mul_kernel[grid](gate_up_TF, out_TI, inner, 1024, num_warps=4, **launch_options(gate_up_TF.device))
    return out_TI
