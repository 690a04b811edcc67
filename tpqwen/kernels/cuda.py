"""The CUDA side of ops.py: which operation runs which kernel. Imported only where there is a GPU.

Scratch buffers are made once per device and shape, so that CUDA graphs may keep their addresses.
"""

from __future__ import annotations

import itertools
from functools import cache
from typing import NamedTuple

import torch

from tpqwen.kernels import (
    attention,
    attention_even,
    attention_parts,
    branch,
    dequantize,
    drafting,
    exchange,
    gemm,
    gemm_norm,
    gemm_tiles,
    launch,
    noise,
    norm,
    paged_prefill,
    prefill,
    sampling,
    stepping,
)
from tpqwen.kernels.attention_table import LONG, MAX_ROWS
from tpqwen.kernels.context import NormedProduct, PrefillRows, Scaled, StepContext
from tpqwen.kernels.exchange import add_up, compile_for, gather


class WrittenChunks(NamedTuple):
    """Chunks whose keys and values are in the cache: queries [T, N, D], normed and rotated; keys, where some chunk is
    `long` enough for cuDNN, and values [T, K, D]."""

    q_TND: torch.Tensor
    k_TKD: torch.Tensor | None
    v_TKD: torch.Tensor
    long: list[bool]
    rows: PrefillRows


def attend(
    qkv_TF: torch.Tensor,
    q_norm_D: torch.Tensor,
    k_norm_D: torch.Tensor,
    eps: float,
    layer: int,
    ctx: StepContext,
    scale: float,
) -> torch.Tensor:
    """reference.attend: decode rows in one fused kernel; chunks are normed, rotated and written, then attend.

    In a graph both attend at once: decode rows wait for memory, chunks for tensor cores and their few programs' long
    way. The chunks' programs follow their predecessor by PDL, so they are there before decode attention, which comes
    from another stream, takes all the room; what norms and writes, many short programs, would not find any beside it.
    """
    k_cache, v_cache = ctx.k_cache[layer], ctx.v_cache[layer]
    kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    width = qkv_TF.shape[1] - 2 * kv_heads * head_dim
    count = ctx.num_decode
    norms = (q_norm_D, k_norm_D, eps, ctx.cos_sin)
    chunks = None if ctx.prefill is None else _write_chunks(qkv_TF[count:], norms, k_cache, v_cache, ctx, ctx.prefill)
    if chunks is not None and not count:
        return _attend_chunks(chunks, k_cache, v_cache, scale)
    out = torch.empty((len(qkv_TF), width), dtype=qkv_TF.dtype, device=qkv_TF.device)
    aside = branch.fork(qkv_TF.device) if chunks is not None else None
    try:
        with torch.cuda.stream(aside):
            attention.decode_attention(
                qkv_TF[:count],
                *norms,
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
                wide=ctx.wide,
            )
        if chunks is not None:
            _attend_chunks(chunks, k_cache, v_cache, scale, out[count:])
    finally:
        branch.join(aside)
    return out


def _write_chunks(
    qkv_TF: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor, float, torch.Tensor],
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    ctx: StepContext,
    rows: PrefillRows,
) -> WrittenChunks:
    """Keys and values of the chunks go into the cache."""
    shape = (len(qkv_TF), k_cache.shape[1], k_cache.shape[3])
    long = [_is_long(*pair, qkv_TF.dtype) for pair in zip(rows.num_query, rows.num_context, strict=True)]
    k_TKD = torch.empty(shape, dtype=qkv_TF.dtype, device=qkv_TF.device) if any(long) else None
    where = (ctx.positions_T[ctx.num_decode :], k_cache, v_cache, ctx.cache_slots_T[ctx.num_decode :])
    q_TND = prefill.qk_norm_rope_write(qkv_TF, *norms, *where, k_out=k_TKD)
    return WrittenChunks(q_TND, k_TKD, qkv_TF[:, -shape[1] * shape[2] :].view(shape), long, rows)


def _attend_chunks(
    chunks: WrittenChunks,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    scale: float,
    out_TF: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of the chunks, [T, N * D]: long whole prompts by cuDNN, the rest in one launch of our own."""
    q_TND, k_TKD, v_TKD, long, rows = chunks
    out = None if out_TF is None else out_TF.view(q_TND.shape)
    scratch = _prefill_scratch(*q_TND.shape[1:], q_TND.device)  # here, so that the pass that measures memory counts it
    starts = [0, *itertools.accumulate(rows.num_query)]
    if k_TKD is not None and all(long):
        attended = prefill.fresh_prefill(q_TND, k_TKD, v_TKD, starts, scale)
        return (attended if out is None else out.copy_(attended)).flatten(1)
    tables, skip_from = (rows.tables_CM, rows.query_start, rows.lengths_C), LONG if any(long) else 0
    out = paged_prefill.paged_prefill(
        q_TND, k_cache, v_cache, *tables, rows.max_query, scale, skip_from=skip_from, scratch=scratch, out=out
    )
    for chunk in itertools.compress(range(len(long)), long):
        assert k_TKD is not None
        span = slice(starts[chunk], starts[chunk + 1])
        whole = (q_TND[span], k_TKD[span], v_TKD[span], [0, rows.num_query[chunk]])
        out[span] = prefill.fresh_prefill(*whole, scale)
    return out.flatten(1)


def _is_long(count: int, length: int, dtype: torch.dtype) -> bool:
    """Whether a chunk is a whole prompt that pays for a call of its own to cuDNN, which takes 16-bit numbers only."""
    return count == length and count >= LONG and dtype.itemsize == 2


def linear_add(
    x_TI: torch.Tensor, weight_HI: torch.Tensor, residual_TH: torch.Tensor, scale_H: torch.Tensor | None = None
) -> torch.Tensor:
    """reference.linear_add in place: nobody reads the residual stream of before, and a copy of it would be a launch."""
    return gemm.linear_add(x_TI, weight_HI, residual_TH, scale_H, out_TH=residual_TH)


def linear_add_scaled(
    x_TI: torch.Tensor,
    weight_HI: torch.Tensor,
    residual_TH: torch.Tensor,
    scale_H: torch.Tensor | None,
    following: NormedProduct,
) -> tuple[torch.Tensor, Scaled | None]:
    """linear_add, in place as well, and what gemm.norm_linear or norm_gate_up makes use of."""
    return gemm.linear_add_scaled(x_TI, weight_HI, residual_TH, scale_H, following, out_TH=residual_TH)


@cache
def _scratch(kv_heads: int, group: int, head_dim: int, device: torch.device) -> attention.DecodeScratch:
    return attention.decode_scratch(MAX_ROWS, kv_heads, group, head_dim, device)


@cache
def _prefill_scratch(num_heads: int, head_dim: int, device: torch.device) -> paged_prefill.PrefillScratch:
    return paged_prefill.prefill_scratch(num_heads, head_dim, device)


OPERATIONS = {
    "add_up_peers": add_up,
    "gather_peers": gather,
    "compile_exchange": compile_for,
    "rms_norm": norm.rms_norm,
    "linear": gemm.linear,
    "norm_linear": gemm.norm_linear,
    "norm_gate_up": gemm.norm_gate_up,
    "linear_add": linear_add,
    "linear_add_scaled": linear_add_scaled,
    "attend": attend,
    "noisy_slices": sampling.noisy_slices,
    "head_slices": sampling.head_slices,
    "choose": sampling.choose,
    "top_candidates": sampling.top_candidates,
    "begin_step": stepping.begin_step,
    "finish_step": stepping.finish_step,
    "begin_drafts": drafting.begin_drafts,
    "accept_drafts": drafting.accept_drafts,
    "edit_slots": stepping.edit_slots,
    "set_rows": stepping.set_rows,
}

launch.settle_keys(
    launch,
    norm,
    dequantize,
    gemm_norm,
    gemm_tiles,
    gemm,
    attention_parts,
    attention_even,
    attention,
    prefill,
    paged_prefill,
    noise,
    sampling,
    stepping,
    drafting,
    exchange,
)
