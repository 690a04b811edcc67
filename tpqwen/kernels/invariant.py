"""Batch-invariant CUDA operations: a token's bits are a function of its own sequence, whatever runs beside it.

T tokens, N outputs (of attention: query heads), K inputs (of attention: key/value heads), G = query heads per key/value
head, D head size, P block size. Four rules make it so, after He and Thinking Machines Lab, "Defeating nondeterminism in
LLM inference" (2025): every product has one tile for all row counts and sums in one order; decode rows and chunks share
one attention, with one tile and each query's own keys in parts of one length; multiplications and additions are never
fused where a compiler might choose to in one place and not in another; what is left works row by row.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import functools
import math
import sys

import torch
import triton
import triton.language as tl

from tpqwen.kernels import prefill, reference, sampling
from tpqwen.kernels.context import StepContext
from tpqwen.kernels.launch import launch_options, release_next, settle_keys, wait_previous
from tpqwen.kernels.norm import rms_norm, silu_mul

BLOCK_M, BLOCK_N, BLOCK_K = 128, 64, 64  # of a product: rows, outputs, inputs
QUERY_ROWS = 64  # of an attention program: tokens times query heads of one key/value head
KEYS = 64  # of an attention tile
PART = 1024  # keys that are summed up before they are merged with those before
PROGRAMS = 512  # that decode rows may be spread over; more rows than that need no more
MAX_SPANS = 4096  # decode rows or chunks of one launch


@triton.jit(do_not_specialize=["M"])
def _matmul_kernel(
    x,
    w,
    w_scale,
    residual,
    out,
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    SCALED: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """One tile of x w^T (+ residual). Rows at or beyond M are zeros, which no other row of the tile sees."""
    release_next(PDL)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)[None, :]
    x_rows, x_known = x + m[:, None] * K + k, m[:, None] < M
    w_rows, w_known = w + n.to(tl.int64)[:, None] * K + k, n[:, None] < N
    wait_previous(PDL)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            x_tile = tl.load(x_rows + start, mask=x_known, other=0.0)
            w_tile = tl.load(w_rows + start, mask=w_known, other=0.0)
        else:
            x_tile = tl.load(x_rows + start, mask=x_known & (start + k < K), other=0.0)
            w_tile = tl.load(w_rows + start, mask=w_known & (start + k < K), other=0.0)
        acc = tl.dot(x_tile, tl.trans(w_tile.to(x_tile.dtype)), acc, input_precision="ieee")
    if SCALED:
        acc *= tl.load(w_scale + n, mask=n < N, other=0.0)[None, :]
    place = m[:, None] * N + n[None, :]
    inside = x_known & (n[None, :] < N)
    if ADD:
        acc += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=inside)


def _matmul(
    x_TK: torch.Tensor,
    weight_NK: torch.Tensor,
    scale_N: torch.Tensor | None = None,
    residual_TN: torch.Tensor | None = None,
) -> torch.Tensor:
    """x W^T, plus the residual before the one rounding: [T, N], written over the residual where there is one. A scale
    is an int8 weight's: fp32, one number for each of its rows."""
    (tokens, width), columns = x_TK.shape, len(weight_NK)
    assert x_TK.is_contiguous() and weight_NK.is_contiguous() and x_TK.data_ptr() % 16 == 0
    out = x_TK.new_empty(tokens, columns) if residual_TN is None else residual_TN
    assert out.is_contiguous() and out.shape == (tokens, columns)
    grid = (triton.cdiv(columns, BLOCK_N), triton.cdiv(tokens, BLOCK_M))
    # What shared memory holds, and registers where int8 becomes fp32; the sums know nothing of it.
    stages = 4 if x_TK.dtype.itemsize == 2 else 2 if scale_N is None else 1
    tile = {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K, "num_warps": 4, "num_stages": stages}
    shape = {"N": columns, "K": width, "ADD": residual_TN is not None, "SCALED": scale_N is not None}
    tensors = (x_TK, weight_NK, out if scale_N is None else scale_N, out, out)
    _matmul_kernel[grid](*tensors, tokens, **shape, **tile, **launch_options(x_TK.device))
    return out


def linear(x_TI: torch.Tensor, weight_OI: torch.Tensor, scale_O: torch.Tensor | None = None) -> torch.Tensor:
    """reference.linear."""
    return _matmul(x_TI, weight_OI, scale_O)


norm_linear = reference.normed(rms_norm, linear)
norm_gate_up = reference.normed(rms_norm, linear, silu_mul)


def linear_add(
    x_TI: torch.Tensor, weight_HI: torch.Tensor, residual_TH: torch.Tensor, scale_H: torch.Tensor | None = None
) -> torch.Tensor:
    """reference.linear_add, in place of the residual."""
    return _matmul(x_TI, weight_HI, scale_H, residual_TH)


# Of the rounded logits, which every other way to sample starts from as well.
head_slices = reference.head_of(norm_linear, sampling.noisy_slices)


@triton.jit
def _nothing(ROWS: tl.constexpr, D: tl.constexpr):
    """The softmax of rows that have seen no key: maxima [ROWS], sums [ROWS], weighted values [ROWS, D]."""
    return tl.full([ROWS], -float("inf"), tl.float32), tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, D], tl.float32)


@triton.jit
def _over_part(queries, position, caches, table, begin, end, length, head, block_stride, qk_scale, SHAPE: tl.constexpr):
    """The softmax of queries [ROWS, D] over keys begin .. end."""
    P: tl.constexpr = SHAPE[0]
    D: tl.constexpr = SHAPE[1]
    ROWS: tl.constexpr = SHAPE[2]
    KEYS: tl.constexpr = SHAPE[3]
    m, l, acc = _nothing(ROWS, D)
    for start in range(begin, end, KEYS):
        block = tl.load(table + start // P).to(tl.int64)
        key = start + tl.arange(0, KEYS)
        at = block * block_stride + head * (P * D) + (key % P)[:, None] * D + tl.arange(0, D)[None, :]
        written = key[:, None] < length
        k = tl.load(caches[0] + at, mask=written, other=0.0)
        s = tl.dot(queries, tl.trans(k), input_precision="ieee") * qk_scale
        s = tl.where(key[None, :] <= position[:, None], s, -float("inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        safe = tl.where(m_new == -float("inf"), 0.0, m_new)
        alpha = tl.exp2(m - safe)
        p = tl.exp2(s - safe[:, None])
        l = l * alpha + tl.sum(p, 1)
        v = tl.load(caches[1] + at, mask=written, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
        m = m_new
    return m, l, acc


@triton.jit
def _merge(state, part):
    """The state after one more part. A part that a query does not see leaves its state as it is, bit by bit."""
    m, l, acc = state
    part_m, part_l, part_acc = part
    m_new = tl.maximum(m, part_m)
    safe = tl.where(m_new == -float("inf"), 0.0, m_new)
    before, after = tl.exp2(m - safe), tl.exp2(part_m - safe)
    return m_new, l * before + part_l * after, acc * before[:, None] + part_acc * after[:, None]


# Slices of one staging buffer may begin anywhere: that must not cause another compilation.
@triton.jit(do_not_specialize_on_alignment=["tables", "table_rows", "query_start", "lengths"])
def _attention_kernel(
    q,
    k_cache,
    v_cache,
    tables,
    table_rows,
    query_start,
    lengths,
    out,
    partial,
    stats,
    qk_scale,
    table_stride,
    block_stride,
    parts,
    K: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    SHAPE: tl.constexpr,
    PART: tl.constexpr,
    APART: tl.constexpr,
    PDL: tl.constexpr,
):
    """One (tile of a span's tokens, KV head, span). Row r of the tile is query head r % GP of token r // GP.

    Every query sees the keys 0 .. its position in parts of PART, each in tiles of KEYS, merged from the first on. What
    other rows of the program need behind a row's position leaves it as it is: that adds zeros and multiplies by one.
    APART (spans of one token): the programs of axis 0 take turns at the parts, and _combine_kernel merges them.
    """
    D: tl.constexpr = SHAPE[1]
    ROWS: tl.constexpr = SHAPE[2]
    release_next(PDL)
    wait_previous(PDL)
    head = tl.program_id(1)
    span = tl.program_id(2)
    first = 0 if APART else (tl.num_programs(0) - 1 - tl.program_id(0)) * (ROWS // GP)  # long rows begin
    begin = tl.load(query_start + span)
    count = tl.load(query_start + span + 1) - begin
    length = tl.load(lengths + span)
    if (first < count) & (length > 0):
        r = tl.arange(0, ROWS)
        token, g = first + r // GP, r % GP
        known = ((token < count) & (g < G))[:, None]
        position = length - count + token
        d = tl.arange(0, D)[None, :]
        place = (begin + token).to(tl.int64)[:, None] * (K * G * D) + (head * G + g)[:, None] * D + d
        queries = tl.load(q + place, mask=known, other=0.0)
        table = tables + tl.load(table_rows + span).to(tl.int64) * table_stride
        caches = (k_cache, v_cache)
        if APART:
            for start in range(tl.program_id(0) * PART, length, tl.num_programs(0) * PART):
                end = tl.minimum(start + PART, length)
                m, l, acc = _over_part(
                    queries, position, caches, table, start, end, length, head, block_stride, qk_scale, SHAPE
                )
                at = ((span * K + head) * parts + start // PART).to(tl.int64) * GP + r
                tl.store(partial + at[:, None] * D + d, acc, mask=known)
                tl.store(stats + at * 2, m, mask=r < GP)
                tl.store(stats + at * 2 + 1, l, mask=r < GP)
        else:
            stop = tl.minimum(length, length - count + first + ROWS // GP)
            state = _nothing(ROWS, D)
            for start in range(0, stop, PART):
                end = tl.minimum(start + PART, stop)
                part = _over_part(
                    queries, position, caches, table, start, end, length, head, block_stride, qk_scale, SHAPE
                )
                state = _merge(state, part)
            _m, l, acc = state
            tl.store(out + place, (acc / l[:, None]).to(out.dtype.element_ty), mask=known)


@triton.jit(do_not_specialize_on_alignment=["lengths"])
def _combine_kernel(
    partial,
    stats,
    lengths,
    out,
    parts,
    K: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    D: tl.constexpr,
    PART: tl.constexpr,
    PDL: tl.constexpr,
):
    """Merge the parts of one (KV head, span of one token) in the order in which a program of its own would."""
    release_next(PDL)
    wait_previous(PDL)
    head = tl.program_id(0)
    span = tl.program_id(1)
    length = tl.load(lengths + span)
    if length > 0:
        g = tl.arange(0, GP)
        d = tl.arange(0, D)[None, :]
        known = (g < G)[:, None]
        state = _nothing(GP, D)
        for part in range(tl.cdiv(length, PART)):
            at = ((span * K + head) * parts + part).to(tl.int64) * GP + g
            acc = tl.load(partial + at[:, None] * D + d, mask=known, other=0.0)
            state = _merge(state, (tl.load(stats + at * 2), tl.load(stats + at * 2 + 1), acc))
        _m, l, acc = state
        place = out + span.to(tl.int64) * (K * G * D) + (head * G + g)[:, None] * D + d
        tl.store(place, (acc / l[:, None]).to(out.dtype.element_ty), mask=known)


def attention(
    q_TND: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    tables_XM: torch.Tensor,
    table_rows: torch.Tensor,
    query_start: torch.Tensor,
    lengths: torch.Tensor,
    max_query: int,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Causal attention of spans over the cache, which holds their own keys and values already, into out [T, N, D].

    Span i is the tokens query_start[i] .. query_start[i + 1] of q, at most max_query of them, and ends at position
    lengths[i] - 1 of the sequence whose blocks tables[table_rows[i]] names. Decode rows are spans of one token, span by
    span. Rows of no span, and those of spans of length 0, are not written. Who computes a part of the keys depends on
    how many spans there are; how it is computed and where it is added does not.
    """
    _, num_heads, head_dim = q_TND.shape
    _, kv_heads, block_size, _ = k_cache.shape
    group, spans = num_heads // kv_heads, len(lengths)
    assert q_TND.is_contiguous() and out.is_contiguous() and k_cache.stride() == v_cache.stride()
    assert k_cache.stride()[1:] == (block_size * head_dim, head_dim, 1) and tables_XM.stride(1) == 1
    padded = triton.next_power_of_2(group)
    parts = triton.cdiv(tables_XM.shape[1] * block_size, PART)
    programs = min(parts, PROGRAMS // (spans * kv_heads)) if max_query == 1 else 1
    apart = programs > 1
    floats = spans * kv_heads * parts * padded if apart else 0
    partial = torch.empty(floats * head_dim, dtype=torch.float32, device=q_TND.device)
    stats = torch.empty(floats * 2, dtype=torch.float32, device=q_TND.device)
    shared = {"K": kv_heads, "G": group, "GP": padded, "PART": PART, "num_warps": 4, "enable_fp_fusion": False}
    shared |= launch_options(q_TND.device)
    _attention_kernel[(programs if apart else triton.cdiv(max_query, QUERY_ROWS // padded), kv_heads, spans)](
        q_TND,
        k_cache,
        v_cache,
        tables_XM,
        table_rows,
        query_start,
        lengths,
        out,
        partial,
        stats,
        scale * math.log2(math.e),
        tables_XM.stride(0),
        k_cache.stride(0),
        parts,
        SHAPE=(block_size, head_dim, QUERY_ROWS, min(KEYS, block_size)),
        APART=apart,
        num_stages=3,
        **shared,
    )
    if apart:
        _combine_kernel[(kv_heads, spans)](partial, stats, lengths, out, parts, D=head_dim, **shared)


@functools.cache
def _counting(device: torch.device) -> torch.Tensor:
    """0, 1, 2 ..., int32: made by the first pass, which no graph captures, and at the same address ever after."""
    return torch.arange(MAX_SPANS + 1, dtype=torch.int32, device=device)


def attend(
    qkv_TF: torch.Tensor,
    q_norm_D: torch.Tensor,
    k_norm_D: torch.Tensor,
    eps: float,
    layer: int,
    ctx: StepContext,
    scale: float,
) -> torch.Tensor:
    """reference.attend: all tokens are normed, rotated and written alike, then decode rows and chunks attend alike."""
    k_cache, v_cache, count = ctx.k_cache[layer], ctx.v_cache[layer], ctx.num_decode
    where = (ctx.positions_T, k_cache, v_cache, ctx.cache_slots_T)
    q_TND = prefill.qk_norm_rope_write(qkv_TF, q_norm_D, k_norm_D, eps, ctx.cos_sin, *where)
    out, counting = torch.zeros_like(q_TND), _counting(qkv_TF.device)
    caches = (k_cache, v_cache)
    assert count <= MAX_SPANS, "more decode rows than spans are numbered for"
    if count:
        spans = (ctx.tables_SM, ctx.decode_slots_B, counting, ctx.decode_lengths_B)
        attention(q_TND[:count], *caches, *spans, 1, scale, out[:count])
    if ctx.prefill is not None:
        p = ctx.prefill
        spans = (p.tables_CM, counting, p.query_start, p.lengths_C)
        attention(q_TND[count:], *caches, *spans, p.max_query, scale, out[count:])
    return out.flatten(1)


OPERATIONS = {
    "linear": linear,
    "norm_linear": norm_linear,
    "norm_gate_up": norm_gate_up,
    "linear_add": linear_add,
    "attend": attend,
    "head_slices": head_slices,
    # Two copies: PyTorch sums up a single row by a scan whose order changes from run to run.
    "choose": reference.by_row(sampling.choose, 0, 1, 3, copies=2),
    "log_sum_exp": reference.by_row(reference.log_sum_exp, 0),
    "top_candidates": reference.ranked_candidates,
}

settle_keys(sys.modules[__name__])
