"""The CUDA side of ops.py: which operation runs which kernel. Imported only where there is a GPU.

Scratch buffers are made once per device and shape, so that CUDA graphs may keep their addresses.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tpqwen.kernels import attention, gemm, norm, prefill, sampling, stepping
from tpqwen.kernels.context import PrefillRows, StepContext

MAX_DECODE_ROWS = 1024
DENSE_FROM = 1024  # tokens of a whole prompt from which gathering its keys and cuDNN beat the paged kernel


def attend(
    qkv_TF: torch.Tensor,
    q_norm_D: torch.Tensor,
    k_norm_D: torch.Tensor,
    eps: float,
    layer: int,
    ctx: StepContext,
    scale: float,
) -> torch.Tensor:
    """reference.attend: decode rows in one fused kernel; chunks are normed, rotated and written, then attend."""
    k_cache, v_cache = ctx.k_cache[layer], ctx.v_cache[layer]
    kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    width = qkv_TF.shape[1] - 2 * kv_heads * head_dim
    out = torch.empty((len(qkv_TF), width), dtype=qkv_TF.dtype, device=qkv_TF.device)
    count = ctx.num_decode
    if ctx.prefill is not None:
        chunk_slots, positions = ctx.cache_slots_T[count:], ctx.positions_T[count:]
        q_TND = prefill.qk_norm_rope_write(
            qkv_TF[count:], q_norm_D, k_norm_D, eps, ctx.cos_sin, positions, k_cache, v_cache, chunk_slots
        )
        out[count:] = _prefill(q_TND, k_cache, v_cache, ctx.prefill, scale).flatten(1)
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
            ctx.tables_SM,
            ctx.decode_slots_B,
            ctx.decode_lengths_B,
            scale,
            _scratch(kv_heads, width // (kv_heads * head_dim), head_dim, qkv_TF.device),
            out=out[:count],
            settled=ctx.settled,
        )
    return out


def _prefill(
    q_TND: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, rows: PrefillRows, scale: float
) -> torch.Tensor:
    """Causal attention of the chunks, [T, N, D]: long whole prompts by cuDNN, the rest in one launch of our own."""
    dense = [_is_dense(*pair, q_TND.dtype) for pair in zip(rows.num_query, rows.num_context, strict=True)]
    if all(dense) and len(set(rows.num_query)) == 1:
        return _dense(q_TND, k_cache, v_cache, rows.tables_CM, rows.num_query[0], scale)
    if all(dense):
        out = torch.empty_like(q_TND)
    else:
        chunks = (rows.tables_CM, rows.query_start, rows.lengths_C, rows.max_query)
        out = prefill.paged_prefill(q_TND, k_cache, v_cache, *chunks, scale)
    start = 0
    for chunk, count in enumerate(rows.num_query):
        if dense[chunk]:
            span, table = slice(start, start + count), rows.tables_CM[chunk : chunk + 1]
            out[span] = _dense(q_TND[span], k_cache, v_cache, table, count, scale)
        start += count
    return out


def _is_dense(count: int, length: int, dtype: torch.dtype) -> bool:
    """Whether a chunk is a whole prompt that pays for cuDNN, which takes 16-bit numbers only."""
    return count == length and count >= DENSE_FROM and dtype.itemsize == 2


def _dense(
    q_TND: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    tables_CM: torch.Tensor,
    length: int,
    scale: float,
) -> torch.Tensor:
    """C whole prompts of one length through cuDNN on gathered keys, [T, N, D]."""
    q_CNSD = q_TND.reshape(len(tables_CM), length, *q_TND.shape[1:]).transpose(1, 2)
    k_CKSD, v_CKSD = (_gathered(c, tables_CM, length) for c in (k_cache, v_cache))
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        mixed = F.scaled_dot_product_attention(q_CNSD, k_CKSD, v_CKSD, is_causal=True, scale=scale, enable_gqa=True)
    return mixed.transpose(1, 2).flatten(0, 1)


def _gathered(cache_layer: torch.Tensor, tables_CM: torch.Tensor, length: int) -> torch.Tensor:
    """The first `length` tokens of each block table, [C, K, length, D]."""
    _, kv_heads, size, head_dim = cache_layer.shape
    blocks = cache_layer[tables_CM[:, : -(-length // size)]]  # [C, M, K, P, D]
    return blocks.transpose(1, 2).reshape(len(tables_CM), kv_heads, -1, head_dim)[:, :, :length]


def linear_add(x_TI: torch.Tensor, weight_HI: torch.Tensor, residual_TH: torch.Tensor) -> torch.Tensor:
    """reference.linear_add in place: nobody reads the residual stream of before, and a copy of it would be a launch."""
    return gemm.linear_add(x_TI, weight_HI, residual_TH, out_TH=residual_TH)


@cache
def _scratch(kv_heads: int, group: int, head_dim: int, device: torch.device) -> attention.DecodeScratch:
    return attention.decode_scratch(MAX_DECODE_ROWS, kv_heads, group, head_dim, device)


OPERATIONS = {
    "rms_norm": norm.rms_norm,
    "linear": gemm.linear,
    "norm_linear": gemm.norm_linear,
    "norm_gate_up": gemm.norm_gate_up,
    "linear_add": linear_add,
    "attend": attend,
    "noisy_slices": sampling.noisy_slices,
    "head_slices": sampling.head_slices,
    "top_candidates": sampling.top_candidates,
    "begin_step": stepping.begin_step,
    "finish_step": stepping.finish_step,
    "edit_slots": stepping.edit_slots,
    "set_rows": stepping.set_rows,
}
