"""Decode attention in one Triton kernel: QK-norm, RoPE, the KV write and split-KV attention over the paged cache.

B decode rows, N query heads, K key/value heads, G = N / K, D head size, P block size, M table width, S splits, T tokens
of a tile, F = (N + 2K) D. Caches are [blocks, K, P, D]. The grid (K, B, S) depends on B and on whether the plan is the
wide one, and lengths are read on the device, so a captured CUDA graph holds for every length. Split-KV after
Flash-Decoding (Dao et al., 2023).
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from tpqwen.kernels.attention_table import DecodePlan, decode_plan, num_splits
from tpqwen.kernels.launch import fitting_stages, launch_options, prefetch_l2, release_next, wait_previous

COMBINE_FLOATS = 8192  # partial sums that the combining program holds at a time
LINE_ELEMENTS = tl.constexpr(64)  # of 2 bytes: one 128-byte cache line


class DecodeScratch(NamedTuple):
    """Partial results of split rows and their arrival counters (all zero between launches). Of one stream at a time."""

    partial: torch.Tensor  # fp32: [rows * K * S, G, D] sums
    stats: torch.Tensor  # fp32: [rows * K * S, 2, G] maxima and sums of the softmax
    arrived: torch.Tensor  # int32 [max_batch * K]


def decode_scratch(
    max_batch: int, kv_heads: int, group: int, head_dim: int, device: torch.device, plan: DecodePlan | None = None
) -> DecodeScratch:
    """Scratch that suffices for every batch up to max_batch, under `plan` or the tuned ones, wide ones included."""
    programs = 0
    for batch, wide in itertools.product(range(1, max_batch + 1), (False, True)):
        tuned = decode_plan(batch, kv_heads, group, head_dim, wide=wide)
        splits = num_splits(plan or tuned, batch * kv_heads)
        programs = max(programs, batch * kv_heads * splits if splits > 1 else 1)
    return DecodeScratch(
        torch.empty((programs, group, head_dim), dtype=torch.float32, device=device),
        torch.empty((programs, 2, group), dtype=torch.float32, device=device),
        torch.zeros(max_batch * kv_heads, dtype=torch.int32, device=device),
    )


@triton.jit
def normed_rope(x, partner, weight, partner_weight, cos, signed_sin, eps, D: tl.constexpr, DTYPE: tl.constexpr):
    """RMSNorm over the last axis and RoPE of x [R, D] fp32. partner holds x[d ^ D/2]; rounding as in reference.py."""
    scale = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
    x = ((x * scale).to(DTYPE).to(tl.float32) * weight).to(DTYPE).to(tl.float32)
    partner = ((partner * scale).to(DTYPE).to(tl.float32) * partner_weight).to(DTYPE).to(tl.float32)
    return (x * cos + partner * signed_sin).to(DTYPE)


@triton.jit
def _tile_pointers(table, start, head, block_stride, P: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr):
    """Offsets [TILE, D] of the cached tokens from `start` on, which lie in one block."""
    block = tl.load(table + start // P).to(tl.int64)
    rows = start % P + tl.arange(0, TILE)
    return block * block_stride + head * (P * D) + rows[:, None] * D + tl.arange(0, D)[None, :]


@triton.jit
def _prefetch(k_cache, v_cache, table, begin, end, head, block_stride, SHAPE: tl.constexpr, TILES: tl.constexpr):
    """Ask for the cache lines of the first TILES tiles from token `begin` on, none at or beyond token `end`."""
    P: tl.constexpr = SHAPE[0]
    D: tl.constexpr = SHAPE[1]
    LINE: tl.constexpr = min(LINE_ELEMENTS, D)
    element = tl.arange(0, TILES * SHAPE[2] * D // LINE) * LINE
    token = begin + element // D
    valid = token < end
    block = tl.load(table + token // P, mask=valid, other=0).to(tl.int64)
    offset = block * block_stride + head * (P * D) + (token % P) * D + element % D
    prefetch_l2(k_cache + offset, valid)
    prefetch_l2(v_cache + offset, valid)


@triton.jit
def _tile_step(q, k, v, valid, state, qk_scale):
    """Online softmax over one tile [TILE, D] of keys and values."""
    m, l, acc = state
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * qk_scale
    s = tl.where(valid[None, :], s, -float("inf"))
    m_new = tl.maximum(m, tl.max(s, 1))
    alpha = tl.exp2(m - m_new)
    p = tl.exp2(s - m_new[:, None])
    l = l * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
    return m_new, l, acc


@triton.jit
def _attend(
    q,
    state,
    caches,
    table,
    first,
    last,
    past,
    head,
    block_stride,
    qk_scale,
    SHAPE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Tiles first .. last: q [GP, D] in the cache's dtype to (m, l, acc)."""
    P: tl.constexpr = SHAPE[0]
    D: tl.constexpr = SHAPE[1]
    TILE: tl.constexpr = SHAPE[2]
    for tile in tl.range(first, last, num_stages=STAGES):
        start = tile * TILE
        offsets = _tile_pointers(table, start, head, block_stride, P, D, TILE)
        valid = start + tl.arange(0, TILE) < past
        k = tl.load(caches[0] + offsets, mask=valid[:, None], other=0.0)
        v = tl.load(caches[1] + offsets, mask=valid[:, None], other=0.0)
        state = _tile_step(q, k, v, valid, state, qk_scale)
    return state


@triton.jit
def _combine(
    partial, stats, base, used, G: tl.constexpr, GS: tl.constexpr, D: tl.constexpr, S: tl.constexpr, CHUNK: tl.constexpr
):
    """Merge the first `used` splits from `base` on: [GS, D]. Reads bypass L1, which may hold an earlier layer's."""
    g = tl.arange(0, GS)
    d = tl.arange(0, D)
    s = tl.arange(0, S)
    known = (s < used)[:, None] & (g < G)[None, :]
    if S == CHUNK:  # everything is on its way before the first value is needed
        rows = (base + s)[:, None, None] * (G * D) + g[None, :, None] * D + d[None, None, :]
        part = tl.load(partial + rows, mask=known[:, :, None], other=0.0, cache_modifier=".cg")
    at = stats + (base + s)[:, None] * (2 * G) + g[None, :]
    m_SG = tl.load(at, mask=known, other=-float("inf"), cache_modifier=".cg")
    l_SG = tl.load(at + G, mask=known, other=0.0, cache_modifier=".cg")
    top = tl.max(m_SG, 0)
    top = tl.where(g < G, top, 0.0)
    weight = tl.exp2(m_SG - top[None, :])
    total = tl.sum(l_SG * weight, 0)
    if S == CHUNK:
        acc = tl.sum(part * weight[:, :, None], 0)
    else:
        acc = tl.zeros([GS, D], tl.float32)
        for start in range(0, used, CHUNK):
            c = start + tl.arange(0, CHUNK)
            here = (c < used)[:, None] & (g < G)[None, :]
            m = tl.load(
                stats + (base + c)[:, None] * (2 * G) + g[None, :], mask=here, other=-float("inf"), cache_modifier=".cg"
            )
            row = (base + c)[:, None, None] * (G * D) + g[None, :, None] * D + d[None, None, :]
            part = tl.load(partial + row, mask=here[:, :, None], other=0.0, cache_modifier=".cg")
            acc += tl.sum(part * tl.exp2(m - top[None, :])[:, :, None], 0)
    return acc / tl.where(g < G, total, 1.0)[:, None]


# Slices of one staging buffer may begin anywhere: that must not cause another compilation.
@triton.jit(do_not_specialize_on_alignment=["positions", "slots", "table_rows", "lengths"])
def _decode_kernel(
    qkv,
    q_norm,
    k_norm,
    cos_sin,
    positions,
    k_cache,
    v_cache,
    slots,
    tables,
    table_rows,
    lengths,
    out,
    partial,
    stats,
    arrived,
    eps,
    qk_scale,
    qkv_stride,
    table_stride,
    block_stride,
    EARLY: tl.constexpr,
    PREFETCH: tl.constexpr,
    HOLD: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    GS: tl.constexpr,
    SHAPE: tl.constexpr,
    STAGES: tl.constexpr,
    S: tl.constexpr,
    S_POW2: tl.constexpr,
    MIN_TILES: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One (KV head, row, split).

    EARLY reads lengths and block tables, and prefetches K/V, before gdc_wait: rule 2 of launch.py. The cache lines of
    this layer that matter were written one step ago, by this kernel. Its own write of the new token is not read by any
    program: the owner of the row's last split takes it from registers, all programs mask it out.
    """
    P: tl.constexpr = SHAPE[0]
    D: tl.constexpr = SHAPE[1]
    TILE: tl.constexpr = SHAPE[2]
    caches = (k_cache, v_cache)
    release_next(PDL)
    head = tl.program_id(0)
    row = tl.program_id(1)
    split = tl.program_id(2)
    d = tl.arange(0, D)
    g = tl.arange(0, GP)
    if not EARLY:
        wait_previous(PDL)
    length = tl.load(lengths + row)
    past = length - 1
    num_tiles = tl.cdiv(tl.maximum(past, 0), TILE)
    per_split = tl.maximum(tl.cdiv(num_tiles, S), MIN_TILES) if S > 1 else num_tiles
    used = tl.maximum(tl.cdiv(num_tiles, per_split), 1) if S > 1 else 1
    if split < used:
        table = tables + tl.load(table_rows + row).to(tl.int64) * table_stride
        first = split * per_split
        last = tl.minimum(first + per_split, num_tiles)
        if PREFETCH > 0:
            end = tl.minimum(last * TILE, past)
            _prefetch(k_cache, v_cache, table, first * TILE, end, head, block_stride, SHAPE, PREFETCH)
        if HOLD:
            held_valid = first * TILE + tl.arange(0, TILE) < past
            held = _tile_pointers(table, first * TILE, head, block_stride, P, D, TILE)
            k_held = tl.load(k_cache + held, mask=held_valid[:, None], other=0.0)
            v_held = tl.load(v_cache + held, mask=held_valid[:, None], other=0.0)
        dtype: tl.constexpr = qkv.dtype.element_ty
        source = qkv + row.to(tl.int64) * qkv_stride
        q_offsets = (head * G + g)[:, None] * D + d[None, :]
        in_group = (g < G)[:, None]
        owner = (split == used - 1) & (length > 0)
        half: tl.constexpr = D // 2
        partner_d = d ^ half
        position = tl.load(positions + row).to(tl.int64)
        slot = tl.load(slots + row).to(tl.int64)
        cos = tl.load(cos_sin + position * D + d % half)[None, :]
        sin = tl.load(cos_sin + position * D + half + d % half)
        sin = tl.where(d < half, -sin, sin)[None, :]
        q_weight = tl.load(q_norm + d).to(tl.float32)[None, :]
        q_weight_partner = tl.load(q_norm + partner_d).to(tl.float32)[None, :]
        k_weight = tl.load(k_norm + d).to(tl.float32)[None, :]
        k_weight_partner = tl.load(k_norm + partner_d).to(tl.float32)[None, :]
        if EARLY:
            wait_previous(PDL)
        q = tl.load(source + q_offsets, mask=in_group, other=0.0)
        q_partner = tl.load(source + (head * G + g)[:, None] * D + partner_d[None, :], mask=in_group, other=0.0)
        k_source = source + (K * G + head) * D
        k_new = tl.load(k_source + d).to(tl.float32)[None, :]
        k_partner = tl.load(k_source + partner_d).to(tl.float32)[None, :]
        v_new = tl.load(k_source + K * D + d)[None, :]
        q = normed_rope(q.to(tl.float32), q_partner.to(tl.float32), q_weight, q_weight_partner, cos, sin, eps, D, dtype)
        k_new = normed_rope(k_new, k_partner, k_weight, k_weight_partner, cos, sin, eps, D, dtype)
        target = slot // P * block_stride + head * (P * D) + slot % P * D + d[None, :]
        write = owner & (slot >= 0)
        tl.store(k_cache + target, k_new, mask=write)
        tl.store(v_cache + target, v_new, mask=write)
        state = (tl.full([GP], -float("inf"), tl.float32), tl.zeros([GP], tl.float32), tl.zeros([GP, D], tl.float32))
        if HOLD:
            if first < last:
                state = _tile_step(q, k_held, v_held, held_valid, state, qk_scale)
            first += 1
        m, l, acc = _attend(q, state, caches, table, first, last, past, head, block_stride, qk_scale, SHAPE, STAGES)
        s_new = tl.sum(q.to(tl.float32) * k_new.to(tl.float32), 1) * qk_scale
        s_new = tl.where(owner, s_new, -float("inf"))
        m_new = tl.maximum(m, s_new)
        safe = tl.where(m_new == -float("inf"), 0.0, m_new)
        alpha = tl.exp2(m - safe)
        p = tl.exp2(s_new - safe)
        l = l * alpha + p
        acc = acc * alpha[:, None] + p[:, None] * v_new.to(tl.float32)
        m = m_new
        target_out = out + row.to(tl.int64) * (K * G * D)
        if used == 1:
            result = acc / tl.where(length > 0, l, 1.0)[:, None]
            result = tl.where(length > 0, result, 0.0)
            tl.store(target_out + q_offsets, result.to(out.dtype.element_ty), mask=in_group)
        else:
            base = (row * K + head) * S
            tl.store(partial + (base + split) * (G * D) + g[:, None] * D + d[None, :], acc, mask=in_group)
            at = stats + (base + split) * (2 * G) + g
            tl.store(at, m, mask=g < G)
            tl.store(at + G, l, mask=g < G)
            # All threads' stores come before the ticket, which one thread draws.
            tl.debug_barrier()
            ticket = tl.atomic_add(arrived + row * K + head, 1, sem="acq_rel")
            if ticket == used - 1:
                result = _combine(partial, stats, base, used, G, GS, D, S_POW2, CHUNK)
                gs = tl.arange(0, GS)
                offsets = (head * G + gs)[:, None] * D + d[None, :]
                tl.store(target_out + offsets, result.to(out.dtype.element_ty), mask=(gs < G)[:, None])
                tl.store(arrived + row * K + head, 0)


def _constants(plan: DecodePlan, splits: int, group: int, k_cache: torch.Tensor) -> dict[str, object]:
    """What the kernel is compiled for."""
    _, kv_heads, block_size, head_dim = k_cache.shape
    padded = max(2, triton.next_power_of_2(group))
    tile = min(plan.tile, block_size)
    return {
        "PREFETCH": plan.prefetch if k_cache.is_cuda else 0,
        "HOLD": plan.hold,
        "K": kv_heads,
        "G": group,
        "GP": max(16, padded),
        "GS": padded,
        "SHAPE": (block_size, head_dim, tile),
        "STAGES": fitting_stages(plan.stages, 2 * tile * head_dim * k_cache.itemsize),
        "S": splits,
        "S_POW2": max(2, triton.next_power_of_2(splits)),
        "MIN_TILES": plan.min_tiles,
        "CHUNK": max(2, min(triton.next_power_of_2(splits), COMBINE_FLOATS // (padded * head_dim))),
        "num_warps": plan.warps,
        **launch_options(k_cache.device),
    }


def decode_attention(
    qkv_BF: torch.Tensor,
    q_norm_D: torch.Tensor,
    k_norm_D: torch.Tensor,
    eps: float,
    cos_sin: torch.Tensor,
    positions_B: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_slots_B: torch.Tensor,
    tables_SM: torch.Tensor,
    table_rows_B: torch.Tensor,
    lengths_B: torch.Tensor,
    scale: float,
    scratch: DecodeScratch,
    *,
    out: torch.Tensor | None = None,
    settled: bool = False,
    wide: bool = False,
    plan: DecodePlan | None = None,
) -> torch.Tensor:
    """qk_norm_rope_write and paged_decode of reference.py for one token per row, in one launch: [B, N * D].

    qkv rows [N query | K key | V value heads] of D. table_rows_B names each row's table. lengths_B counts this step's
    token, whose slot is cache_slots_B (-1: not written); rows of length 0 give zeros. settled, wide: as in
    StepContext.
    """
    _, kv_heads, block_size, head_dim = k_cache.shape
    batch, width = len(qkv_BF), qkv_BF.shape[1] - 2 * kv_heads * head_dim
    group = width // (kv_heads * head_dim)
    out = torch.empty((batch, width), dtype=qkv_BF.dtype, device=qkv_BF.device) if out is None else out
    plan = plan or decode_plan(batch, kv_heads, group, head_dim, wide=wide)
    splits = num_splits(plan, batch * kv_heads)
    assert k_cache.stride() == v_cache.stride() and k_cache.stride()[1:] == (block_size * head_dim, head_dim, 1)
    assert qkv_BF.stride(-1) == 1 and out.is_contiguous() and tables_SM.stride(1) == 1
    assert splits == 1 or batch * kv_heads * splits <= len(scratch.partial), "the scratch is for fewer rows"
    assert batch * kv_heads <= len(scratch.arrived)
    tensors = (qkv_BF, q_norm_D, k_norm_D, cos_sin, positions_B, k_cache, v_cache, cache_slots_B)
    _decode_kernel[(kv_heads, batch, splits)](
        *tensors,
        tables_SM,
        table_rows_B,
        lengths_B,
        out,
        *scratch,
        eps,
        scale * math.log2(math.e),
        qkv_BF.stride(0),
        tables_SM.stride(0),
        k_cache.stride(0),
        EARLY=settled,
        **_constants(plan, splits, group, k_cache),
    )
    return out
