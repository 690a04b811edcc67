"""Sampling kernels: the Gumbel maximum over logits, the same fused with the LM head, and exact top-k candidates.

R rows, V vocabulary ids of this shard, H hidden, S slices of the vocabulary, G groups of ids. Noise (noise.py) is the
reference's, so every path and every rank draws the same. Fusing head and sampling after FlashSampling
(arXiv 2603.15854): the logits never reach memory.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, var-annotated"

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from tpqwen.kernels import gemm
from tpqwen.kernels.context import SlotTensors
from tpqwen.kernels.launch import launch_options, prefetch_weights, release_next, wait_previous
from tpqwen.kernels.noise import group_noise, id_noise, tile_noise
from tpqwen.kernels.norm import rms_norm
from tpqwen.kernels.reference import GREEDY_BELOW, MAX_CANDIDATES, choose_by, head_of

NO_ID = tl.constexpr(0x7FFFFFFF)
COLDEST = tl.constexpr(GREEDY_BELOW)
LISTED = 1024  # ids that one program of gumbel_noise draws for
SLICE = 4096  # logits that one program of noisy_slices looks at
FEW = tl.constexpr(MAX_CANDIDATES)
FAN = 16  # ids per group and groups per supergroup in top_candidates
SUPERS = MAX_CANDIDATES * FAN
MAX_FUSED_ROWS = 64
MULTIPROCESSORS = 132  # of H100 and H200


@triton.jit
def _id_noise_kernel(ids, seeds, choices, out_index, noise, C, IDS: tl.constexpr):
    row = tl.program_id(0)
    c = tl.program_id(1) * IDS + tl.arange(0, IDS)
    place = row.to(tl.int64) * C + c
    token = tl.load(ids + place, mask=c < C, other=0)
    drawn = id_noise(tl.load(seeds + row), tl.load(out_index + row), tl.load(choices + row), token)
    tl.store(noise + place, drawn, mask=c < C)


@triton.jit
def _load_draw(slots, temperature, top_k, seeds, choices, out_index, row, inside):
    """What the rows' slots draw with: temperature fp32 (0 with a small top_k), seed int64, choice and index int32."""
    slot = tl.load(slots + row, mask=inside, other=0)
    heat = tl.load(temperature + slot, mask=inside, other=0.0)
    k = tl.load(top_k + slot, mask=inside, other=0)
    heat = tl.where((k > 0) & (k <= FEW), 0.0, heat)
    seed = tl.load(seeds + slot, mask=inside, other=0)
    choice = tl.load(choices + slot, mask=inside, other=0)
    return heat, seed, choice, tl.load(out_index + slot, mask=inside, other=0)


@triton.jit
def _noisy_slice_kernel(
    logits,
    slots,
    temperature,
    top_k,
    seeds,
    choices,
    out_index,
    best,
    best_id,
    V,
    base,
    SHIFT: tl.constexpr,
    IDS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Best score and id of slice (row, s). base is first_id rounded down to 4, SHIFT the rest."""
    release_next(PDL)
    row = tl.program_id(0)
    # Four ids a line, as they are drawn for: so a thread loads the logits of its own noise.
    group = tl.program_id(1) * (IDS // 4) + tl.arange(0, IDS // 4)[:, None]
    v = group * 4 - SHIFT + tl.arange(0, 4)[None, :]
    wait_previous(PDL)
    heat, seed, choice, index = _load_draw(slots, temperature, top_k, seeds, choices, out_index, row, True)
    score = tl.load(logits + row.to(tl.int64) * V + v, mask=(v >= 0) & (v < V), other=float("-inf")).to(tl.float32)
    score = tl.where(score == score, score, float("inf"))
    if heat >= COLDEST:
        score = score * (1.0 / heat) + group_noise(seed, index, choice, base // 4 + group)
    top = tl.max(tl.max(score, axis=1), axis=0)
    place = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(best + place, top)
    ids = tl.where((score == top) & (v >= 0), base + SHIFT + v, NO_ID)
    tl.store(best_id + place, tl.min(tl.min(ids, axis=1), axis=0))


@triton.jit
def _head_row_kernel(
    h,
    w,
    norm,
    slots,
    temperature,
    top_k,
    seeds,
    choices,
    out_index,
    best,
    best_id,
    scores,
    eps,
    V,
    base,
    num_valid,
    SHIFT: tl.constexpr,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    IDS: tl.constexpr,
    TILES: tl.constexpr,
    PDL: tl.constexpr,
):
    """LM head of one row: a program takes every num_programs-th tile of IDS ids and loads the next one early.

    Its scores go through memory, so that noise is drawn for all of its ids at once and not tile by tile, by every
    thread the same.
    """
    release_next(PDL)
    first = tl.program_id(0)
    stride = tl.num_programs(0)
    k = tl.arange(0, WIDTH)[None, :]
    lane = tl.arange(0, IDS)
    inside = k < K
    v = tl.minimum(tl.maximum(first * IDS - SHIFT + lane, 0), V - 1)
    ahead = tl.load(w + v[:, None] * K + k, mask=inside, other=0.0, eviction_policy="evict_first")
    scale = tl.load(norm + k, mask=inside, other=0.0).to(tl.float32)
    wait_previous(PDL)
    heat, seed, choice, index = _load_draw(slots, temperature, top_k, seeds, choices, out_index, 0, True)
    x = tl.load(h + k, mask=inside, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(tl.sum(x * x, axis=1), axis=0) / K + eps)
    x = x * scale * rstd
    num_tiles = tl.cdiv(V + SHIFT, IDS)
    mine = scores + first * (TILES * IDS)
    at = mine + lane
    for tile in range(first, num_tiles, stride):
        weights = ahead
        v = tl.minimum(tl.maximum((tile + stride) * IDS - SHIFT + lane, 0), V - 1)
        ahead = tl.load(w + v[:, None] * K + k, mask=inside, other=0.0, eviction_policy="evict_first")
        tl.store(at, tl.sum(weights.to(tl.float32) * x, axis=1))
        at += IDS
    tl.debug_barrier()
    tile = first + tl.arange(0, TILES)[:, None] * stride
    v = tile * IDS - SHIFT + lane[None, :]
    known = (tile < num_tiles) & (v >= 0) & (v < V) & (base + SHIFT + v < num_valid)
    score = tl.load(mine + tl.arange(0, TILES)[:, None] * IDS + lane[None, :], mask=tile < num_tiles, other=0.0)
    score = tl.where(score == score, score, float("inf"))
    if heat >= COLDEST:
        group = (base + tile * IDS) // 4 + tl.arange(0, IDS // 4)[None, :]
        score = score * (1.0 / heat) + group_noise(seed, index, choice, group)
    score = tl.where(known, score, float("-inf"))
    top = tl.max(tl.max(score, axis=1), axis=0)
    ids = tl.where((score == top) & (v >= 0) & (tile < num_tiles), base + SHIFT + v, NO_ID)
    tl.store(best + first, top)
    tl.store(best_id + first, tl.min(tl.min(ids, axis=1), axis=0))


@triton.jit(do_not_specialize=["M"])
def _head_rows_kernel(
    x,
    w,
    slots,
    temperature,
    top_k,
    seeds,
    choices,
    out_index,
    best,
    best_id,
    M,
    V,
    base,
    num_valid,
    K,
    SHIFT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IDS: tl.constexpr,
    PREFETCH: tl.constexpr,
    WARPS: tl.constexpr,
    PDL: tl.constexpr,
):
    """LM head of normalized rows x [M, K]: persistent programs, each with a running best per row over its tiles."""
    release_next(PDL)
    first = tl.program_id(0)
    stride = tl.num_programs(0)
    lane = tl.arange(0, IDS)
    if PDL and PREFETCH > 0:
        early = tl.minimum(tl.maximum(first * IDS - SHIFT + lane, 0), V - 1)
        prefetch_weights(w, early[:, None], K, 0, IDS, PREFETCH, WARPS)
    wait_previous(PDL)
    m = tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)[None, :]
    heat, seed, choice, index = _load_draw(slots, temperature, top_k, seeds, choices, out_index, m, m < M)
    drawn = heat >= COLDEST
    any_drawn = tl.max(drawn.to(tl.int32), axis=0) > 0
    coldness = 1.0 / tl.where(drawn, heat, 1.0)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    top_id = tl.full([BLOCK_M], 0, tl.int32) + base + SHIFT + tl.maximum(first * IDS - SHIFT, 0)
    for tile in range(first, tl.cdiv(V + SHIFT, IDS), stride):
        v = tile * IDS - SHIFT + lane
        rows = tl.minimum(tl.maximum(v, 0), V - 1)[:, None]
        score = tl.zeros([IDS, BLOCK_M], tl.float32)
        for step in range(0, K, BLOCK_K):
            weights = tl.load(w + rows * K + (step + k), eviction_policy="evict_first")
            values = tl.load(x + m[:, None] * K + (step + k), mask=m[:, None] < M, other=0.0)
            score = tl.dot(weights, tl.trans(values), score, input_precision="ieee")
        score = tl.where(score == score, score, float("inf"))
        if any_drawn:
            noise = tile_noise(seed, index, choice, (base + tile * IDS) // 4, IDS, BLOCK_M)
            score = tl.where(drawn[None, :], score * coldness[None, :] + noise, score)
        valid = (v >= 0) & (v < V) & (base + SHIFT + v < num_valid)
        score = tl.where(valid[:, None], score, float("-inf"))
        tile_top = tl.max(score, axis=0)
        ids = tl.where(v >= 0, base + SHIFT + v, NO_ID)[:, None]
        tile_id = tl.min(tl.where(score == tile_top[None, :], ids, NO_ID), axis=0)
        top_id = tl.where(tile_top > top, tile_id, top_id)
        top = tl.maximum(top, tile_top)
    tl.store(best + m * stride + first, top, mask=m < M)
    tl.store(best_id + m * stride + first, top_id, mask=m < M)


@triton.jit
def _ordered(value):
    """fp32 as int32 of the same order."""
    bits = value.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _fan_max_kernel(
    logits,
    maxima,
    V,
    ROW: tl.constexpr,
    SUPERS: tl.constexpr,
    FAN: tl.constexpr,
    AT_ONCE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Maxima of groups of FAN ids, and of supergroups of FAN groups; a row of `maxima` starts with the supergroups."""
    release_next(PDL)
    row = tl.program_id(0)
    g = tl.program_id(1) * AT_ONCE * FAN + tl.arange(0, AT_ONCE * FAN)
    v = g[:, None] * FAN + tl.arange(0, FAN)[None, :]
    wait_previous(PDL)
    value = tl.load(logits + row.to(tl.int64) * V + v, mask=v < V, other=float("-inf")).to(tl.float32)
    group = tl.max(value, axis=1)
    tl.store(maxima + row * ROW + SUPERS + g, group, mask=g * FAN < V)
    s = tl.program_id(1) * AT_ONCE + tl.arange(0, AT_ONCE)
    highest = tl.max(tl.reshape(group, [AT_ONCE, FAN]), axis=1)
    tl.store(maxima + row * ROW + s, highest, mask=s * FAN * FAN < V)


@triton.jit
def _top_kernel(
    logits,
    maxima,
    values,
    ids,
    V,
    count,
    ROW: tl.constexpr,
    SUPERS: tl.constexpr,
    FAN: tl.constexpr,
    KEPT: tl.constexpr,
    PDL: tl.constexpr,
):
    """The best `count` <= KEPT logits of a row, by descent: each level keeps the KEPT nodes with the highest maxima.

    The KEPT best ids lie in those nodes. Sorted as int64 keys of (value, lowest id first), so ties have one answer.
    """
    release_next(PDL)
    row = tl.program_id(0)
    nodes = tl.arange(0, KEPT)  # KEPT * FAN = SUPERS, so that their children are all the supergroups
    order = tl.zeros([KEPT], tl.int32)
    wait_previous(PDL)
    for level in range(3):
        child = tl.reshape(nodes[:, None] * FAN + tl.arange(0, FAN)[None, :], [KEPT * FAN])
        limit = tl.where(level == 0, tl.cdiv(V, FAN * FAN), tl.where(level == 1, tl.cdiv(V, FAN), V))
        place = tl.where(level == 0, 0, SUPERS) + child
        inner = tl.load(maxima + row * ROW + place, mask=(child < limit) & (level < 2), other=float("-inf"))
        leaf = tl.load(logits + row.to(tl.int64) * V + child, mask=(child < limit) & (level == 2), other=float("-inf"))
        value = tl.where(level == 2, leaf.to(tl.float32), inner)
        keys = tl.topk((_ordered(value).to(tl.int64) << 32) | (-child + NO_ID).to(tl.int64), KEPT)
        nodes = -(keys & NO_ID).to(tl.int32) + NO_ID
        order = (keys >> 32).to(tl.int32)
    kept = tl.arange(0, KEPT)
    place = row * count + kept
    tl.store(values + place, (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True), mask=kept < count)
    tl.store(ids + place, nodes.to(tl.int64), mask=kept < count)


class HeadPlan(NamedTuple):
    """How the fused LM head runs: `programs` take turns at tiles of `ids` ids. The rest is for several rows only."""

    ids: int
    warps: int
    programs: int
    stages: int = 4
    block_k: int = 64
    prefetch: int = 512


def head_plan(rows: int, hidden: int) -> HeadPlan:
    """The plan for `rows` rows of `hidden` columns, measured on an H200 up to 32 rows, on an H100 beyond."""
    if rows == 1:
        few = HeadPlan(8, 2, MULTIPROCESSORS * 6) if hidden <= 1024 else HeadPlan(8, 4, MULTIPROCESSORS * 4)
        return few if hidden <= 2048 else HeadPlan(4, 8, MULTIPROCESSORS * 4)
    if rows <= 16:
        return HeadPlan(64, 4, MULTIPROCESSORS * (4 if hidden <= 2048 else 2), stages=5, prefetch=0)
    if rows <= 32:
        return HeadPlan(64, 4, MULTIPROCESSORS * 2, block_k=128, prefetch=0)
    return HeadPlan(64, 4, MULTIPROCESSORS * 2, stages=3, block_k=128)


def _slices(rows: int, count: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for the best score fp32 and id int32 of every (row, slice)."""
    shape = (rows, count)
    return (
        torch.empty(shape, dtype=torch.float32, device=device),
        torch.empty(shape, dtype=torch.int32, device=device),
    )


def _draw(state: SlotTensors, slots_R: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return slots_R, state.temperature, state.top_k, state.seed, state.choice, state.out_index


def gumbel_noise(
    seeds_B: torch.Tensor, choices_B: torch.Tensor, out_index_B: torch.Tensor, ids_BV: torch.Tensor
) -> torch.Tensor:
    """reference.gumbel_noise in one launch, a plain one, where that takes 200."""
    ids_BV = ids_BV.expand(len(seeds_B), -1).contiguous()
    noise = torch.empty(ids_BV.shape, dtype=torch.float32, device=ids_BV.device)
    if noise.numel():
        grid = (len(noise), triton.cdiv(noise.shape[1], LISTED))
        _id_noise_kernel[grid](ids_BV, seeds_B, choices_B, out_index_B, noise, noise.shape[1], LISTED, num_warps=4)
    return noise


choose = partial(choose_by, gumbel_noise)


def noisy_slices(
    logits_RV: torch.Tensor, state: SlotTensors, slots_R: torch.Tensor, first_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """reference.noisy_slices of contiguous bf16 or fp32 logits, SLICE ids a slice; ids int32. NaN gives +inf."""
    assert logits_RV.is_contiguous(), "noisy_slices takes contiguous logits"
    rows, vocab = logits_RV.shape
    shift = first_id % 4
    ids = min(SLICE, max(4, triton.next_power_of_2(vocab + shift)))
    best, best_id = _slices(rows, triton.cdiv(vocab + shift, ids), logits_RV.device)
    if rows:
        _noisy_slice_kernel[tuple(best.shape)](
            logits_RV,
            *_draw(state, slots_R),
            best,
            best_id,
            vocab,
            first_id - shift,
            shift,
            ids,
            num_warps=4,
            **launch_options(logits_RV.device),
        )
    return best, best_id


_unfused_head = head_of(gemm.norm_linear, noisy_slices)


def head_slices(
    h_RH: torch.Tensor,
    norm_H: torch.Tensor,
    eps: float,
    weight_VH: torch.Tensor,
    state: SlotTensors,
    slots_R: torch.Tensor,
    first_id: int,
    num_valid: int,
    *,
    plan: HeadPlan | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """reference.head_slices, without logits in memory up to MAX_FUSED_ROWS rows. NaN gives +inf.

    Fused scores come from fp32 sums that are never rounded to h's dtype, so a near tie may go otherwise than on rounded
    logits.
    """
    rows, hidden = h_RH.shape
    if not 0 < rows <= MAX_FUSED_ROWS or hidden % 64:
        value_RS, token_RS = _unfused_head(h_RH, norm_H, eps, weight_VH, state, slots_R, first_id, num_valid)
        return value_RS, token_RS
    assert h_RH.is_contiguous() and weight_VH.is_contiguous(), "head_slices takes contiguous tensors"
    vocab, shift = len(weight_VH), first_id % 4
    place = (vocab, first_id - shift, first_id + num_valid)
    plan = head_plan(rows, hidden) if plan is None else plan
    best, best_id = _slices(rows, min(plan.programs, triton.cdiv(vocab + shift, plan.ids)), h_RH.device)
    draw = _draw(state, slots_R)
    grid, options = (best.shape[1],), {"num_warps": plan.warps, **launch_options(h_RH.device)}
    if rows == 1:
        tiles = triton.next_power_of_2(triton.cdiv(triton.cdiv(vocab + shift, plan.ids), grid[0]))
        scores = torch.empty(grid[0] * tiles * plan.ids, dtype=torch.float32, device=h_RH.device)
        shape = (shift, hidden, triton.next_power_of_2(hidden), plan.ids, tiles)
        _head_row_kernel[grid](h_RH, weight_VH, norm_H, *draw, best, best_id, scores, eps, *place, *shape, **options)
        return best, best_id
    x_RH = rms_norm(h_RH, norm_H, eps)
    block_m = max(16, triton.next_power_of_2(rows))
    early = min(hidden, plan.prefetch) if plan.warps * 32 >= plan.ids else 0
    shape = (hidden, shift, block_m, plan.block_k, plan.ids, early, plan.warps)
    _head_rows_kernel[grid](
        x_RH, weight_VH, *draw, best, best_id, rows, *place, *shape, num_stages=plan.stages, **options
    )
    return best, best_id


def top_candidates(logits_BV: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` largest logits of each row, best first, ties by lowest id: values fp32 and ids int64 [B, count].

    Exact. Up to 64 candidates of at most 262144 ids, one pass finds the maxima of groups and supergroups and a second
    descends into the best of them; the rest goes to torch.topk (whose order of ties is its own).
    """
    rows, vocab = logits_BV.shape
    if count > MAX_CANDIDATES or not MAX_CANDIDATES <= vocab <= SUPERS * FAN * FAN or not rows:
        values_BK, ids_BK = torch.topk(logits_BV, count)
        return values_BK.float(), ids_BK
    assert logits_BV.is_contiguous(), "top_candidates takes contiguous logits"
    width = SUPERS * (1 + FAN)
    maxima = torch.empty(rows, width, dtype=torch.float32, device=logits_BV.device)
    values_BK = torch.empty(rows, count, dtype=torch.float32, device=logits_BV.device)
    ids_BK = torch.empty(rows, count, dtype=torch.int64, device=logits_BV.device)
    options = launch_options(logits_BV.device)
    at_once = 16
    grid = (rows, triton.cdiv(vocab, at_once * FAN * FAN))
    _fan_max_kernel[grid](logits_BV, maxima, vocab, width, SUPERS, FAN, at_once, num_warps=4, **options)
    shape = (width, SUPERS, FAN, MAX_CANDIDATES)
    _top_kernel[(rows,)](logits_BV, maxima, values_BK, ids_BK, vocab, count, *shape, num_warps=8, **options)
    return values_BK, ids_BK
