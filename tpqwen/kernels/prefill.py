"""What chunks of prompts need around their attention: QK-norm + RoPE + KV write, and attention of whole long prompts.

T tokens, N query heads, K key/value heads, G = N / K, D head size, P block size, S context tokens. Caches are
[blocks, K, P, D]. Where a chunk is its whole context and long, cuDNN's SDPA on the keys and values just made is the
fastest (fresh_prefill); all others read the cache through block tables (paged_prefill.py).
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"

from __future__ import annotations

import functools
import itertools

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.nn.attention import SDPBackend, sdpa_kernel

from tpqwen.kernels.attention_table import PLANNED
from tpqwen.kernels.launch import launch_options, release_next, wait_previous

WRITE_TOKENS = 16  # of one program of the QK-norm kernel


@triton.jit
def _halves(source, valid, D: tl.constexpr):
    """One head's rows as two halves [R, D/2]."""
    half: tl.constexpr = D // 2
    h = tl.arange(0, half)[None, :]
    return tl.load(source + h, mask=valid, other=0.0), tl.load(source + half + h, mask=valid, other=0.0)


@triton.jit
def _norm_rope(a, b, weight_a, weight_b, cos, sin, eps, D: tl.constexpr):
    """RMSNorm and RoPE of one head's halves; rounding as in reference.py."""
    dtype: tl.constexpr = a.dtype
    a = a.to(tl.float32)
    b = b.to(tl.float32)
    scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / D + eps)[:, None]
    a = ((a * scale).to(dtype).to(tl.float32) * weight_a.to(tl.float32)).to(dtype).to(tl.float32)
    b = ((b * scale).to(dtype).to(tl.float32) * weight_b.to(tl.float32)).to(dtype).to(tl.float32)
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
    """One (block of tokens, KV head): its G query heads, its key, its value. All is asked for before anything is
    stored: a load behind a store would wait, since what it reads might be what was written."""
    release_next(PDL)
    head = tl.program_id(1)
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    known = t < num_tokens
    valid = known[:, None]
    half: tl.constexpr = D // 2
    h = tl.arange(0, half)[None, :]
    d = tl.arange(0, D)[None, :]
    query_weights = (tl.load(q_norm + h), tl.load(q_norm + half + h))
    key_weights = (tl.load(k_norm + h), tl.load(k_norm + half + h))
    wait_previous(PDL)
    position = tl.load(positions + t, mask=known, other=0).to(tl.int64)[:, None]
    slot = tl.load(slots + t, mask=known, other=-1).to(tl.int64)[:, None]
    rows = qkv + t[:, None] * qkv_stride
    queries = ()
    for g in tl.static_range(G):
        queries = queries + (_halves(rows + (head * G + g) * D, valid, D),)  # noqa: RUF005
    key = rows + (K * G + head) * D
    a, b = _halves(key, valid, D)
    value = tl.load(key + K * D + d, mask=valid, other=0.0)
    cos = tl.load(cos_sin + position * D + h, mask=valid, other=0.0)
    sin = tl.load(cos_sin + position * D + half + h, mask=valid, other=0.0)
    a, b = _norm_rope(a, b, key_weights[0], key_weights[1], cos, sin, eps, D)
    written = slot >= 0
    at = slot // P * block_stride + head * (P * D) + slot % P * D
    tl.store(v_cache + at + d, value, mask=written)
    tl.store(k_cache + at + h, a.to(k_cache.dtype.element_ty), mask=written)
    tl.store(k_cache + at + half + h, b.to(k_cache.dtype.element_ty), mask=written)
    if KEEP_KEYS:
        target = k_out + t[:, None] * (K * D) + head * D + h
        tl.store(target, a.to(k_out.dtype.element_ty), mask=valid)
        tl.store(target + half, b.to(k_out.dtype.element_ty), mask=valid)
    for g in tl.static_range(G):
        a, b = _norm_rope(queries[g][0], queries[g][1], query_weights[0], query_weights[1], cos, sin, eps, D)
        target = out + t[:, None] * (K * G * D) + (head * G + g) * D + h
        tl.store(target, a.to(out.dtype.element_ty), mask=valid)
        tl.store(target + half, b.to(out.dtype.element_ty), mask=valid)


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
    length, v_BSKD = q_BSND.shape[1], v_BSKD.contiguous()  # a plan holds for strides as well
    if short := -length % PLANNED:
        q_BSND, k_BSKD, v_BSKD = (F.pad(x, (0, 0, 0, 0, 0, short)) for x in (q_BSND, k_BSKD, v_BSKD))
    return _sdpa(q_BSND, k_BSKD, v_BSKD, scale)[:, :length]
