"""Decode attention of many rows: all their tiles divided evenly over a fixed number of programs, which walk over rows.

B rows, K key/value heads, G query heads per KV head, D head size, P block size, TILE tokens of a tile. The tiles of a
batch lie in one line: rows in order, each row's heads in order, each head's tiles in order; a row has at least one a
head. Each program takes one piece of that line. Rows and heads that lie in several pieces are parts to be merged, and
neither a row's length nor the number of rows leaves a program without work. After Stream-K (Osama et al., 2023).
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from tpqwen.kernels.attention_parts import attend, begin_row, end_row, every_row, new_token, two_halves
from tpqwen.kernels.launch import release_next, wait_previous


# Slices of one staging buffer may begin anywhere, and rows come and go: neither may cause another compilation.
@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["positions", "slots", "table_rows", "lengths"])
def even_kernel(
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
    rows,
    EARLY: tl.constexpr,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    GS: tl.constexpr,
    SHAPE: tl.constexpr,
    STAGES: tl.constexpr,
    MOST: tl.constexpr,
    MERGED: tl.constexpr,
    PDL: tl.constexpr,
):
    """One piece of the line. EARLY reads lengths before gdc_wait: rule 2 of launch.py.

    Its own write of a new token is not read by any program: who has the row's last tile takes it from registers, all
    mask it out. Part number p + n of the scratch is program p's of the n-th row and head: these are different for
    different pairs, since a program goes from one row and head to the next, and parts of one row and head lie together.
    """
    D: tl.constexpr = SHAPE[1]
    TILE: tl.constexpr = SHAPE[2]
    release_next(PDL)
    program = tl.program_id(0)
    g, every = every_row(GS, D)
    if not EARLY:
        wait_previous(PDL)
    r = tl.arange(0, ROWS)
    tiles_R = tl.cdiv(tl.load(lengths + r, mask=r < rows, other=0) - 1, TILE)
    ends_R = K * tl.cumsum(tl.where(r < rows, tl.maximum(tiles_R, 1), 0), 0)
    total = tl.max(ends_R, 0)
    share = tl.cdiv(total, tl.num_programs(0))
    at = program * share
    stop = tl.minimum(at + share, total)
    row = tl.sum((ends_R <= at).to(tl.int32), 0)
    row_begin = tl.max(tl.where(ends_R <= at, ends_R, 0), 0)
    weights = (two_halves(q_norm + every, D), two_halves(k_norm + every, D))
    if EARLY:
        wait_previous(PDL)
    while at < stop:
        length = tl.load(lengths + row)
        num_tiles = tl.cdiv(length - 1, TILE)
        count = tl.maximum(num_tiles, 1)
        head = (at - row_begin) // count
        begin = row_begin + head * count
        first = at - begin
        last = tl.minimum(first + stop - at, count)
        table = tables + tl.load(table_rows + row).to(tl.int64) * table_stride
        token = new_token(qkv + row.to(tl.int64) * qkv_stride, head, g, every, K, G, D)
        position = tl.load(positions + row).to(tl.int64)
        slot = tl.load(slots + row).to(tl.int64)
        cos_and_sin = two_halves(cos_sin + position * D + every, D)
        owner = (last == count) & (length > 0)
        caches, place = (k_cache, v_cache), (slot, head, block_stride, every)
        q, state = begin_row(token, weights, cos_and_sin, caches, place, owner, eps, qk_scale, GP, SHAPE)
        tiles_end, past = tl.minimum(last, num_tiles), length - 1
        state = attend(q, state, caches, table, first, tiles_end, past, head, block_stride, qk_scale, SHAPE, STAGES)
        pair = row * K + head
        first_program = begin // share
        used = (begin + count - 1) // share - first_program + 1
        target_out = out + row.to(tl.int64) * (K * G * D) + head * (G * D)
        base, part = first_program + pair, program - first_program
        end_row(state, length, base, part, used, arrived + pair, target_out, partial, stats, G, GS, MOST, MERGED)
        at += last - first
        if (head == K - 1) & (last == count):
            row += 1
            row_begin = at
