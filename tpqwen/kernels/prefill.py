"""Prefill attention: QK-norm + RoPE + KV write for many tokens, and causal attention of chunks over the paged cache.

T tokens, C chunks, N query heads, K key/value heads, G = N / K, D head size, P block size, M table width, S context
tokens. Caches are [blocks, K, P, D]. Where a chunk is its whole context and long, cuDNN's SDPA on the keys and values
just made is the fastest (fresh_prefill); all others read the cache through block tables in one launch of our own.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.tools.tensor_descriptor import TensorDescriptor

from tpqwen.kernels.launch import launch_options, release_next, wait_previous

WRITE_TOKENS = 16  # of one program of the QK-norm kernel
PLANNED = 512  # tokens: prompts for cuDNN are rounded up to a multiple


class PrefillPlan(NamedTuple):
    """Tile of queries and of keys, warps, pipeline stages, and whether tiles come by TMA descriptors."""

    queries: int
    keys: int
    warps: int
    stages: int
    tma: bool


PLANS: dict[int, PrefillPlan] = {  # by head size
    64: PrefillPlan(queries=128, keys=64, warps=4, stages=3, tma=False),
    128: PrefillPlan(queries=64, keys=64, warps=4, stages=3, tma=True),
}
SMALL_PLAN = PrefillPlan(queries=64, keys=64, warps=4, stages=2, tma=False)


@triton.jit
def _half_norm_rope(source, weight, cos, sin, valid, eps, D: tl.constexpr):
    """RMSNorm and RoPE of one head's rows, read and returned as two halves [R, D/2]; rounding as in reference.py."""
    half: tl.constexpr = D // 2
    dtype: tl.constexpr = source.dtype.element_ty
    h = tl.arange(0, half)[None, :]
    a = tl.load(source + h, mask=valid, other=0.0).to(tl.float32)
    b = tl.load(source + half + h, mask=valid, other=0.0).to(tl.float32)
    scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / D + eps)[:, None]
    weight_a = tl.load(weight + h).to(tl.float32)
    weight_b = tl.load(weight + half + h).to(tl.float32)
    a = ((a * scale).to(dtype).to(tl.float32) * weight_a).to(dtype).to(tl.float32)
    b = ((b * scale).to(dtype).to(tl.float32) * weight_b).to(dtype).to(tl.float32)
    return a * cos - b * sin, b * cos + a * sin


# Counts and slices of one staging buffer change from step to step: neither may cause a compilation.
@triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["positions", "slots"])
def _qk_norm_rope_write_kernel(
    qkv,
    q_norm,
    k_norm,
    cos_sin,
    positions,
    slots,
    k_cache,
    v_cache,
    out,
    k_out,
    eps,
    num_tokens,
    qkv_stride,
    block_stride,
    K: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    KEEP_KEYS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One (block of tokens, KV head): its G query heads, its key, its value."""
    release_next(PDL)
    wait_previous(PDL)
    head = tl.program_id(1)
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    known = t < num_tokens
    valid = known[:, None]
    half: tl.constexpr = D // 2
    h = tl.arange(0, half)[None, :]
    position = tl.load(positions + t, mask=known, other=0).to(tl.int64)[:, None]
    cos = tl.load(cos_sin + position * D + h, mask=valid, other=0.0)
    sin = tl.load(cos_sin + position * D + half + h, mask=valid, other=0.0)
    rows = qkv + t[:, None] * qkv_stride
    for g in tl.static_range(G):
        a, b = _half_norm_rope(rows + (head * G + g) * D, q_norm, cos, sin, valid, eps, D)
        target = out + t[:, None] * (K * G * D) + (head * G + g) * D + h
        tl.store(target, a.to(out.dtype.element_ty), mask=valid)
        tl.store(target + half, b.to(out.dtype.element_ty), mask=valid)
    slot = tl.load(slots + t, mask=known, other=-1).to(tl.int64)[:, None]
    written = slot >= 0
    at = slot // P * block_stride + head * (P * D) + slot % P * D
    key = rows + (K * G + head) * D
    a, b = _half_norm_rope(key, k_norm, cos, sin, valid, eps, D)
    tl.store(k_cache + at + h, a.to(k_cache.dtype.element_ty), mask=written)
    tl.store(k_cache + at + half + h, b.to(k_cache.dtype.element_ty), mask=written)
    if KEEP_KEYS:
        target = k_out + t[:, None] * (K * D) + head * D + h
        tl.store(target, a.to(k_out.dtype.element_ty), mask=valid)
        tl.store(target + half, b.to(k_out.dtype.element_ty), mask=valid)
    d = tl.arange(0, D)[None, :]
    tl.store(v_cache + at + d, tl.load(key + K * D + d, mask=valid, other=0.0), mask=written)


def qk_norm_rope_write(
    qkv_TF: torch.Tensor,
    q_norm_D: torch.Tensor,
    k_norm_D: torch.Tensor,
    eps: float,
    cos_sin: torch.Tensor,
    positions_T: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_slots_T: torch.Tensor,
    *,
    k_out: torch.Tensor | None = None,
) -> torch.Tensor:
    """reference.qk_norm_rope_write in one launch: k and v go to the cache, the queries are returned, [T, N, D].

    k_out [T, K, D], where given, receives the keys as well (for fresh_prefill).
    """
    num_tokens, width = qkv_TF.shape
    _, kv_heads, block_size, head_dim = k_cache.shape
    group = width // (kv_heads * head_dim) - 2
    assert qkv_TF.stride(1) == 1 and k_cache.stride() == v_cache.stride()
    assert k_cache.stride()[1:] == (block_size * head_dim, head_dim, 1) and (k_out is None or k_out.is_contiguous())
    out = torch.empty((num_tokens, kv_heads * group, head_dim), dtype=qkv_TF.dtype, device=qkv_TF.device)
    _qk_norm_rope_write_kernel[(triton.cdiv(num_tokens, WRITE_TOKENS), kv_heads)](
        qkv_TF,
        q_norm_D,
        k_norm_D,
        cos_sin,
        positions_T,
        cache_slots_T,
        k_cache,
        v_cache,
        out,
        out if k_out is None else k_out,
        eps,
        num_tokens,
        qkv_TF.stride(0),
        k_cache.stride(0),
        K=kv_heads,
        G=group,
        D=head_dim,
        P=block_size,
        ROWS=WRITE_TOKENS,
        KEEP_KEYS=k_out is not None,
        num_warps=4,
        **launch_options(qkv_TF.device),
    )
    return out


@triton.jit
def _load_tile(
    cache, table, start, head, stop, block_stride, SHAPE: tl.constexpr, TMA: tl.constexpr, MASK: tl.constexpr
):
    """Cached keys or values [KEYS, D] from position `start` on, all in one block. MASK: zeros at or beyond `stop`."""
    K: tl.constexpr = SHAPE[0]
    P: tl.constexpr = SHAPE[1]
    D: tl.constexpr = SHAPE[2]
    KEYS: tl.constexpr = SHAPE[3]
    block = tl.load(table + start // P)
    rows = tl.arange(0, KEYS)[:, None]
    if TMA:
        tile = cache.load([(block * K + head) * P + start % P, 0])
        if MASK:
            tile = tl.where(start + rows < stop, tile, 0.0)
    else:
        offsets = block.to(tl.int64) * block_stride + head * (P * D) + (start % P + rows) * D + tl.arange(0, D)[None, :]
        tile = tl.load(cache + offsets, mask=start + rows < stop, other=0.0) if MASK else tl.load(cache + offsets)
    return tile


@triton.jit
def _tiles(
    q, state, caches, table, first, last, position, head, stop, block_stride, qk_scale,
    SHAPE: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr, MASK: tl.constexpr
):  # fmt: skip
    """Online softmax over key tiles first .. last. MASK: some keys lie behind a query's position, or beyond stop."""
    m, l, acc = state
    for tile in tl.range(first, last, num_stages=STAGES):
        start = tile * SHAPE[3]
        k = _load_tile(caches[0], table, start, head, stop, block_stride, SHAPE, TMA, MASK and not TMA)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        if MASK:
            s = tl.where(start + tl.arange(0, SHAPE[3])[None, :] <= position[:, None], s, -float("inf"))
        m_new = tl.maximum(m, tl.max(s, 1) * qk_scale)
        p = tl.exp2(s * qk_scale - m_new[:, None])
        alpha = tl.exp2(m - m_new)
        l = l * alpha + tl.sum(p, 1)
        v = _load_tile(caches[1], table, start, head, stop, block_stride, SHAPE, TMA, MASK)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
        m = m_new
    return m, l, acc


@triton.jit(
    do_not_specialize=["num_tokens", "num_chunks"],
    do_not_specialize_on_alignment=["tables", "query_start", "lengths"],
)
def _prefill_kernel(
    q,
    k_cache,
    v_cache,
    tables,
    query_start,
    lengths,
    out,
    qk_scale,
    num_tokens,
    num_chunks,
    q_stride,
    table_stride,
    block_stride,
    SHAPE: tl.constexpr,
    G: tl.constexpr,
    QUERIES: tl.constexpr,
    STAGES: tl.constexpr,
    CHUNKS: tl.constexpr,
    SKIP_FROM: tl.constexpr,
    TMA: tl.constexpr,
    PDL: tl.constexpr,
):
    """One (query head, tile of queries of one chunk). Long tiles come first: the last positions see most keys."""
    K: tl.constexpr = SHAPE[0]
    D: tl.constexpr = SHAPE[2]
    release_next(PDL)
    wait_previous(PDL)
    query_head = tl.program_id(0)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    # Chunk i owns tile numbers from query_start[i] // QUERIES + i on, which is room enough for any lengths; after the
    # last chunk comes one pseudo-chunk, the rows of no chunk. (The numbering is that of vLLM's Triton attention.)
    i = tl.arange(0, CHUNKS)
    starts = tl.load(query_start + i, mask=i <= num_chunks, other=0)
    chunk = tl.sum(((i <= num_chunks) & (starts // QUERIES + i <= tile)).to(tl.int32), 0) - 1
    begin = tl.load(query_start + chunk)
    row = (tile - (begin // QUERIES + chunk)) * QUERIES + tl.arange(0, QUERIES)
    d = tl.arange(0, D)[None, :]
    if chunk < num_chunks:
        count = tl.load(query_start + chunk + 1) - begin
        first_row = (tile - (begin // QUERIES + chunk)) * QUERIES
        length = tl.load(lengths + chunk)
        skipped = (SKIP_FROM > 0) & (count == length) & (count >= SKIP_FROM)
        if (first_row < count) & (skipped == 0):
            position = length - count + row
            table = tables + chunk.to(tl.int64) * table_stride
            head = query_head // G
            at = (begin + row).to(tl.int64)[:, None]
            valid = (row < count)[:, None]
            queries = tl.load(q + at * q_stride + query_head * D + d, mask=valid, other=0.0)
            m = tl.full([QUERIES], -float("inf"), tl.float32)
            l = tl.zeros([QUERIES], tl.float32)
            acc = tl.zeros([QUERIES, D], tl.float32)
            seen_by_all = length - count + first_row + 1
            stop = tl.minimum(length, seen_by_all + QUERIES - 1)
            whole = seen_by_all // SHAPE[3]
            caches = (k_cache, v_cache)
            state = _tiles(
                queries, (m, l, acc), caches, table, 0, whole, position, head, length, block_stride, qk_scale,
                SHAPE, STAGES, TMA, False
            )  # fmt: skip
            m, l, acc = _tiles(
                queries, state, caches, table, whole, tl.cdiv(stop, SHAPE[3]), position, head, length, block_stride,
                qk_scale, SHAPE, STAGES, TMA, True
            )  # fmt: skip
            result = acc / l[:, None]
            tl.store(out + at * (K * G * D) + query_head * D + d, result.to(out.dtype.element_ty), mask=valid)
    else:
        at = (begin + row).to(tl.int64)[:, None]
        nothing = tl.zeros([QUERIES, D], out.dtype.element_ty)
        tl.store(out + at * (K * G * D) + query_head * D + d, nothing, mask=at < num_tokens)


def _descriptors(caches: tuple[torch.Tensor, torch.Tensor], keys: int) -> tuple[TensorDescriptor, TensorDescriptor]:
    k_rows, v_rows = (c.view(-1, c.shape[-1]) for c in caches)
    shape = [keys, k_rows.shape[1]]
    return TensorDescriptor.from_tensor(k_rows, shape), TensorDescriptor.from_tensor(v_rows, shape)


def paged_prefill(
    q_TND: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    tables_CM: torch.Tensor,
    query_start: torch.Tensor,
    lengths_C: torch.Tensor,
    max_query: int,
    scale: float,
    *,
    skip_from: int = 0,
    out: torch.Tensor | None = None,
    plan: PrefillPlan | None = None,
) -> torch.Tensor:
    """reference.paged_prefill: causal attention of chunks whose keys are already in the cache, [T, N, D].

    The grid follows from T and C alone. max_query only serves to take smaller tiles when every chunk is short. Chunks
    of at least skip_from > 0 tokens that are their whole context are left out: their rows are not written.
    """
    num_tokens, num_heads, head_dim = q_TND.shape
    _, kv_heads, block_size, _ = k_cache.shape
    plan = plan or PLANS.get(head_dim, SMALL_PLAN)
    queries = max(16, min(plan.queries, triton.next_power_of_2(max_query)))
    keys = min(plan.keys, block_size)
    num_chunks = len(lengths_C)
    assert k_cache.is_contiguous() and v_cache.is_contiguous() and q_TND.stride()[1:] == (head_dim, 1)
    out = torch.empty_like(q_TND, memory_format=torch.contiguous_format) if out is None else out
    k, v = _descriptors((k_cache, v_cache), keys) if plan.tma else (k_cache, v_cache)
    _prefill_kernel[(num_heads, num_tokens // queries + num_chunks + 1)](
        q_TND,
        k,
        v,
        tables_CM,
        query_start,
        lengths_C,
        out,
        scale * math.log2(math.e),
        num_tokens,
        num_chunks,
        q_TND.stride(0),
        tables_CM.stride(0),
        k_cache.stride(0),
        SHAPE=(kv_heads, block_size, head_dim, keys),
        G=num_heads // kv_heads,
        QUERIES=queries,
        STAGES=plan.stages,
        CHUNKS=max(16, triton.next_power_of_2(num_chunks + 1)),
        SKIP_FROM=skip_from,
        TMA=plan.tma,
        num_warps=plan.warps if queries == plan.queries else 4,
        **launch_options(q_TND.device),
    )
    return out


@functools.cache
def _backends(device: str) -> list[SDPBackend]:
    """cuDNN first on GPUs that have it; the others remain for shapes that it refuses."""
    rest = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return [SDPBackend.CUDNN_ATTENTION, *rest] if device == "cuda" else rest


def _sdpa(q_BSND: torch.Tensor, k_BSKD: torch.Tensor, v_BSKD: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal SDPA of [B, S, heads, D] views, back in the same order."""
    q, k, v = (x.transpose(1, 2) for x in (q_BSND, k_BSKD, v_BSKD))
    with sdpa_kernel(_backends(q.device.type), set_priority=True):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)


def fresh_prefill(
    q_TND: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor, query_start: list[int], scale: float
) -> torch.Tensor:
    """Causal attention of chunks that are their whole context, through SDPA: [T, N, D]. query_start is a host list.

    Equal lengths run as one batch, others one by one. cuDNN plans every new shape anew, which takes longer than many a
    prompt, so lengths are rounded up to PLANNED tokens: zeros behind the last token, which no real query sees.
    """
    spans = [(a, b) for a, b in itertools.pairwise(query_start) if b > a]
    if len({b - a for a, b in spans}) == 1 and query_start[-1] == len(q_TND):
        q, k, v = (x.view(len(spans), -1, *x.shape[1:]) for x in (q_TND, k_TKD, v_TKD))
        return _rounded_sdpa(q, k, v, scale).flatten(0, 1)
    result = torch.zeros_like(q_TND)
    for a, b in spans:
        result[a:b] = _rounded_sdpa(q_TND[None, a:b], k_TKD[None, a:b], v_TKD[None, a:b], scale)[0]
    return result


def _rounded_sdpa(q_BSND: torch.Tensor, k_BSKD: torch.Tensor, v_BSKD: torch.Tensor, scale: float) -> torch.Tensor:
    length = q_BSND.shape[1]
    if short := -length % PLANNED:
        q_BSND, k_BSKD, v_BSKD = (F.pad(x, (0, 0, 0, 0, 0, short)) for x in (q_BSND, k_BSKD, v_BSKD))
    return _sdpa(q_BSND, k_BSKD, v_BSKD, scale)[:, :length]
