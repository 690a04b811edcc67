"""An int8 weight written out as 16-bit numbers, for the products of many rows that go to cuBLAS.

O outputs, I inputs. It moves three bytes for each weight: much beside the product of few rows, little beside that of a
thousand.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tpqwen.kernels.launch import launch_options, release_next, wait_previous

BLOCK = 4096  # numbers of one program


@triton.jit
def _dequantize_kernel(w, w_scale, out, I, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """One program for each row and BLOCK inputs; only the store waits, for what came before may still read `out`."""
    release_next(PDL)
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(w + row * I + i, mask=i < I, other=0).to(tl.float32) * tl.load(w_scale + row)
    wait_previous(PDL)
    tl.store(out + row * I + i, values.to(out.dtype.element_ty), mask=i < I)


def dequantize(
    weight_OI: torch.Tensor, scale_O: torch.Tensor, dtype: torch.dtype, *, out_OI: torch.Tensor | None = None
) -> torch.Tensor:
    """reference.dequantize of a contiguous weight."""
    assert weight_OI.is_contiguous() and weight_OI.dtype == torch.int8, "dequantize takes contiguous int8"
    out_OI = torch.empty_like(weight_OI, dtype=dtype) if out_OI is None else out_OI
    rows, width = weight_OI.shape
    block = min(BLOCK, triton.next_power_of_2(width))
    grid = (rows, triton.cdiv(width, block))
    _dequantize_kernel[grid](weight_OI, scale_O, out_OI, width, block, num_warps=4, **launch_options(weight_OI.device))
    return out_OI
