"""The Triton side of ops.py: which operation runs which kernel on a CUDA device. Imported only where there is one.

Scratch buffers are made once per device and shape, so that CUDA graphs may keep their addresses.
"""

from __future__ import annotations

from functools import cache

import torch

from tpqwen.kernels import attention, gemm, prefill, reference, sampling
from tpqwen.kernels.context import StepContext

MAX_DECODE_ROWS = 1024


@cache
def _scratch(kv_heads: int, group: int, head_dim: int, device: torch.device) -> attention.DecodeScratch:
    return attention.decode_scratch(MAX_DECODE_ROWS, kv_heads, group, head_dim, device)


def attend(
    qkv_TF: torch.Tensor,
    q_norm_D: torch.Tensor,
    k_norm_D: torch.Tensor,
    eps: float,
    layer: int,
    ctx: StepContext,
    scale: float,
) -> torch.Tensor:
    """reference.attend: decode rows in one fused kernel; chunks through norm, rope, write and prefill attention."""
    k_cache, v_cache = ctx.k_cache[layer], ctx.v_cache[layer]
    kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    width = qkv_TF.shape[1] - 2 * kv_heads * head_dim
    out = torch.empty((len(qkv_TF), width), dtype=qkv_TF.dtype, device=qkv_TF.device)
    count = ctx.num_decode
    if ctx.prefill is not None:
        p = ctx.prefill
        q_TND = prefill.qk_norm_rope_write(
            qkv_TF[count:],
            q_norm_D,
            k_norm_D,
            eps,
            ctx.cos_sin,
            ctx.positions_T[count:],
            k_cache,
            v_cache,
            ctx.cache_slots_T[count:],
        )
        out[count:] = prefill.paged_prefill(
            q_TND, k_cache, v_cache, p.tables_CM, p.query_start, p.lengths_C, p.max_query, scale
        ).flatten(1)
    if count:
        attention.decode_attention(
            qkv_TF[:count],
            q_norm_D,
            k_norm_D,
            eps,
            ctx.cos_sin,
            ctx.positions_T[:count],
            k_cache,
            v_cache,
            ctx.cache_slots_T[:count],
            ctx.decode_tables_BM,
            ctx.decode_lengths_B,
            scale,
            _scratch(kv_heads, width // (kv_heads * head_dim), head_dim, qkv_TF.device),
            out=out[:count],
        )
    return out


OPERATIONS = {
    "linear": gemm.linear,
    "norm_linear": gemm.norm_linear,
    "norm_gate_up": gemm.norm_gate_up,
    "linear_add": gemm.linear_add,
    "attend": attend,
    "noisy_argmax": sampling.noisy_argmax,
    "top_candidates": reference.top_candidates,
}
