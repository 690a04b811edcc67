"""One public function per operation, the only import site of the kernels: Triton on CUDA, the reference elsewhere.

Shapes and meaning of each are in kernels/reference.py, which is the specification.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch

from tpqwen.kernels import reference
from tpqwen.kernels.context import StepContext

Op = Callable[..., Any]


@cache
def _cuda() -> dict[str, Op]:
    """Operations with a Triton version. Imported on first use: machines without a GPU need no Triton."""
    table: dict[str, Op] = import_module("tpqwen.kernels.cuda").OPERATIONS
    return table


def _pick(name: str, x: torch.Tensor) -> Op:
    fallback: Op = getattr(reference, name)
    return _cuda().get(name, fallback) if x.is_cuda else fallback


def linear(x_TI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """x W^T."""
    result: torch.Tensor = _pick("linear", x_TI)(x_TI, weight_OI)
    return result


def rms_norm(x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last axis."""
    result: torch.Tensor = _pick("rms_norm", x_TH)(x_TH, weight_H, eps)
    return result


def norm_linear(h_TH: torch.Tensor, norm_H: torch.Tensor, eps: float, weight_OH: torch.Tensor) -> torch.Tensor:
    """RMSNorm, then x W^T."""
    result: torch.Tensor = _pick("norm_linear", h_TH)(h_TH, norm_H, eps, weight_OH)
    return result


def norm_gate_up(h_TH: torch.Tensor, norm_H: torch.Tensor, eps: float, weight_FH: torch.Tensor) -> torch.Tensor:
    """RMSNorm, then silu(gate) * up."""
    result: torch.Tensor = _pick("norm_gate_up", h_TH)(h_TH, norm_H, eps, weight_FH)
    return result


def linear_add(x_TI: torch.Tensor, weight_HI: torch.Tensor, residual_TH: torch.Tensor) -> torch.Tensor:
    """residual + x W^T. The residual may be overwritten: use only what is returned."""
    result: torch.Tensor = _pick("linear_add", x_TI)(x_TI, weight_HI, residual_TH)
    return result


def attend(
    qkv_TF: torch.Tensor,
    q_norm_D: torch.Tensor,
    k_norm_D: torch.Tensor,
    eps: float,
    layer: int,
    ctx: StepContext,
    scale: float,
) -> torch.Tensor:
    """QK-norm, RoPE, KV write and attention of decode rows and chunks: [T, N * D]. The seam for fused kernels."""
    result: torch.Tensor = _pick("attend", qkv_TF)(qkv_TF, q_norm_D, k_norm_D, eps, layer, ctx, scale)
    return result


def gumbel_noise(seed: torch.Tensor, choice: torch.Tensor, out_index: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Noise of each (row, id); ids [V] or [R, V]."""
    return reference.gumbel_noise(seed, choice, out_index, ids)


def noisy_argmax(
    logits_RV: torch.Tensor,
    temperature: torch.Tensor,
    seed: torch.Tensor,
    choice: torch.Tensor,
    out_index: torch.Tensor,
    first_id: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Value fp32 and global id of the arg-max of logits / T + noise."""
    op = _pick("noisy_argmax", logits_RV)
    value, token = op(logits_RV, temperature, seed, choice, out_index, first_id)
    return value, token


def top_candidates(logits_RV: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` largest logits of each row, best first, with their local ids (int64)."""
    values, ids = _pick("top_candidates", logits_RV)(logits_RV, count)
    return values, ids
