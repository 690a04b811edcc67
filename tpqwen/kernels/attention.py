"""Decode attention in one Triton kernel: QK-norm, RoPE, the KV write and split-KV attention over the paged cache.

B decode rows, N query heads, K key/value heads, G = N / K, D head size, P block size, M table width, S splits,
F = (N + 2K) D. Caches are [blocks, K, P, D]. The kernel here gives each row and KV head S programs, the one of
attention_even.py is for passes with a long row. Grids depend on B and on which of the two it is, and lengths are read
on the device, so a captured CUDA graph holds for every length. Split-KV after Flash-Decoding (Dao et al., 2023).
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from tpqwen.kernels.attention_even import even_kernel
from tpqwen.kernels.attention_parts import (
    attend,
    begin_row,
    end_row,
    every_row,
    new_token,
    prefetch_tiles,
    tile_pointers,
    tile_step,
    two_halves,
)
from tpqwen.kernels.attention_table import MAX_ROWS, DecodePlan, decode_plan, num_parts, num_splits
from tpqwen.kernels.launch import fitting_stages, launch_options, pdl_supported, release_next, wait_previous

COMBINE_FLOATS = 8192  # partial sums that the combining program holds at a time


class DecodeScratch(NamedTuple):
    """Partial results of split rows and their arrival counters (all zero between launches). Of one stream at a time."""

    partial: torch.Tensor  # fp32: [parts, G, D] sums
    stats: torch.Tensor  # fp32: [parts, 2, G] maxima and sums of the softmax
    arrived: torch.Tensor  # int32 [max_batch * K]


def decode_scratch(
    max_batch: int, kv_heads: int, group: int, head_dim: int, device: torch.device, plan: DecodePlan | None = None
) -> DecodeScratch:
    """Scratch that suffices for every batch up to max_batch, under `plan` or the tuned ones, wide ones included."""
    parts = max(
        num_parts(plan or decode_plan(batch, kv_heads, group, head_dim, wide=wide), batch * kv_heads)
        for batch, wide in itertools.product(range(1, max_batch + 1), (False, True))
    )
    return DecodeScratch(
        torch.empty((parts, group, head_dim), dtype=torch.float32, device=device),
        torch.empty((parts, 2, group), dtype=torch.float32, device=device),
        torch.zeros(max_batch * kv_heads, dtype=torch.int32, device=device),
    )


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
    WARPS: tl.constexpr,
    HOLD: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    GS: tl.constexpr,
    SHAPE: tl.constexpr,
    STAGES: tl.constexpr,
    S: tl.constexpr,
    MOST: tl.constexpr,
    MERGED: tl.constexpr,
    MIN_TILES: tl.constexpr,
    PDL: tl.constexpr,
):
    """One (KV head, row, split).

    EARLY reads lengths and block tables, and prefetches K/V, before gdc_wait: rule 2 of launch.py. The cache lines of
    this layer that matter were written one step ago, by this kernel. Its own write of the new token is not read by any
    program: the owner of the row's last split takes it from registers, all programs mask it out.
    """
    D: tl.constexpr = SHAPE[1]
    TILE: tl.constexpr = SHAPE[2]
    caches = (k_cache, v_cache)
    release_next(PDL)
    head = tl.program_id(0)
    row = tl.program_id(1)
    split = tl.program_id(2)
    g, every = every_row(GS, D)
    if not EARLY:
        wait_previous(PDL)
    length = tl.load(lengths + row)
    table = tables + tl.load(table_rows + row).to(tl.int64) * table_stride
    position = tl.load(positions + row).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    past = length - 1
    num_tiles = tl.cdiv(tl.maximum(past, 0), TILE)
    per_split = tl.maximum(tl.cdiv(num_tiles, S), MIN_TILES) if S > 1 else num_tiles
    used = tl.maximum(tl.cdiv(num_tiles, per_split), 1) if S > 1 else 1
    if split < used:
        first = split * per_split
        last = tl.minimum(first + per_split, num_tiles)
        if PREFETCH > 0:
            end = tl.minimum(last * TILE, past)
            prefetch_tiles(caches, table, first * TILE, end, head, block_stride, SHAPE, PREFETCH, WARPS)
        if HOLD:
            held_valid = first * TILE + tl.arange(0, TILE) < past
            held = tile_pointers(table, first * TILE, head, block_stride, SHAPE)
            k_held = tl.load(k_cache + held, mask=held_valid[:, None], other=0.0)
            v_held = tl.load(v_cache + held, mask=held_valid[:, None], other=0.0)
        owner = (split == used - 1) & (length > 0)
        cos_and_sin = two_halves(cos_sin + position * D + every, D)
        weights = (two_halves(q_norm + every, D), two_halves(k_norm + every, D))
        if EARLY:
            wait_previous(PDL)
        token = new_token(qkv + row.to(tl.int64) * qkv_stride, head, g, every, K, G, D)
        place = (slot, head, block_stride, every)
        q, state = begin_row(token, weights, cos_and_sin, caches, place, owner, eps, qk_scale, GP, SHAPE)
        if HOLD:
            if first < last:
                state = tile_step(q, k_held, v_held, held_valid, state, qk_scale)
            first += 1
        state = attend(q, state, caches, table, first, last, past, head, block_stride, qk_scale, SHAPE, STAGES)
        pair = row * K + head
        target_out = out + row.to(tl.int64) * (K * G * D) + head * (G * D)
        end_row(state, length, pair * S, split, used, arrived + pair, target_out, partial, stats, G, GS, MOST, MERGED)


def _constants(plan: DecodePlan, group: int, k_cache: torch.Tensor) -> dict[str, object]:
    """What either kernel is compiled for."""
    _, kv_heads, block_size, head_dim = k_cache.shape
    padded = max(2, triton.next_power_of_2(group))
    tile = min(plan.tile, block_size)
    constants = {
        "K": kv_heads,
        "G": group,
        "GP": max(16, padded),
        "GS": padded,
        "SHAPE": (block_size, head_dim, tile),
        "STAGES": fitting_stages(plan.stages, 2 * tile * head_dim * k_cache.itemsize),
        "MERGED": max(2, (COMBINE_FLOATS // 4 if plan.even else COMBINE_FLOATS) // (padded * head_dim)),
        "num_warps": plan.warps,
        **launch_options(k_cache.device),
    }
    return constants | ({"maxnreg": plan.registers} if plan.registers and constants["PDL"] else {})


def _split_constants(plan: DecodePlan, splits: int, device: torch.device) -> dict[str, object]:
    return {
        "PREFETCH": plan.prefetch if pdl_supported(device) else 0,  # older ones have no such request
        "WARPS": plan.warps,
        "HOLD": plan.hold,
        "S": splits,
        "MOST": max(2, triton.next_power_of_2(splits)),
        "MIN_TILES": plan.min_tiles,
    }


def _even_constants(plan: DecodePlan, kv_heads: int) -> dict[str, object]:
    return {"ROWS": MAX_ROWS, "MOST": triton.next_power_of_2(plan.programs // kv_heads + 2)}


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
    assert k_cache.stride() == v_cache.stride() and k_cache.stride()[1:] == (block_size * head_dim, head_dim, 1)
    assert qkv_BF.stride(-1) == 1 and out.is_contiguous() and tables_SM.stride(1) == 1
    assert num_parts(plan, batch * kv_heads) <= len(scratch.partial), "the scratch is for fewer rows"
    assert batch * kv_heads <= len(scratch.arrived)
    tensors = (qkv_BF, q_norm_D, k_norm_D, cos_sin, positions_B, k_cache, v_cache, cache_slots_B)
    arguments = (
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
    )
    shared = {"EARLY": settled, **_constants(plan, group, k_cache)}
    if plan.even:
        assert batch <= MAX_ROWS
        even_kernel[(plan.programs,)](*arguments, batch, **shared, **_even_constants(plan, kv_heads))
    else:
        grid = (kv_heads, batch, num_splits(plan, batch * kv_heads))
        _decode_kernel[grid](*arguments, **shared, **_split_constants(plan, grid[2], k_cache.device))
    return out
