"""What the decode attention kernels are made of: a row's new token, the tiles of its cache, and the merge of its parts.

K key/value heads, G query heads per KV head, GS and GP: G padded to a power of two, and to a tensor core's 16 rows.
D head size, P block size, TILE cached tokens taken at once; SHAPE is (P, D, TILE). Caches are [blocks, K, P, D].
A state is the online softmax of one row and KV head: maxima [GP], sums of each tile's column [GP, TILE], sums of values
[GP, D]. It begins with the new token, which is in no cache yet. MOST: parts that a row may have, a power of two;
MERGED: how many of them the program that merges a row holds at a time.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from tpqwen.kernels.launch import prefetch_l2


@triton.jit
def every_row(GS: tl.constexpr, D: tl.constexpr):
    """Rows [GS, 1], and the places of half a head, [GS, D / 2], the same in each row.

    What belongs to no query head is loaded once per row all the same: then everything up to the products has one layout
    and needs no exchange between threads.
    """
    g = tl.arange(0, GS)[:, None]
    return g, g * 0 + tl.arange(0, D // 2)[None, :]


@triton.jit
def two_halves(pointers, D: tl.constexpr):
    """The first half of a head, which `pointers` name, and the second."""
    return tl.load(pointers), tl.load(pointers + D // 2)


@triton.jit
def _rope_halves(x, weight, cos_sin, eps, D: tl.constexpr, DTYPE: tl.constexpr):
    """RMSNorm of each row and RoPE of its two halves [GS, D / 2]; rounding as in reference.py."""
    a, b = x[0].to(tl.float32), x[1].to(tl.float32)
    scale = tl.rsqrt(tl.sum(a * a + b * b, 1) / D + eps)[:, None]
    a = ((a * scale).to(DTYPE).to(tl.float32) * weight[0].to(tl.float32)).to(DTYPE).to(tl.float32)
    b = ((b * scale).to(DTYPE).to(tl.float32) * weight[1].to(tl.float32)).to(DTYPE).to(tl.float32)
    cos, sin = cos_sin
    return (a * cos - b * sin).to(DTYPE), (b * cos + a * sin).to(DTYPE)


@triton.jit
def _whole(x, GP: tl.constexpr):
    """Two halves [GS, D / 2] as [GP, D]: the rows again and again."""
    GS: tl.constexpr = x[0].shape[0]
    D: tl.constexpr = 2 * x[0].shape[1]
    rows = tl.reshape(tl.permute(tl.join(x[0], x[1]), (0, 2, 1)), (GS, D))
    return tl.reshape(tl.broadcast_to(rows[None, :, :], (GP // GS, GS, D)), (GP, D))


@triton.jit
def new_token(source, head, g, every, K: tl.constexpr, G: tl.constexpr, D: tl.constexpr):
    """What the products made of a row's token for one KV head: query heads, key and value, as halves [GS, D / 2]."""
    half: tl.constexpr = D // 2
    at = source + head * (G * D) + g * D + every
    in_group = (g < G) & (every >= 0)
    q = (tl.load(at, mask=in_group, other=0.0), tl.load(at + half, mask=in_group, other=0.0))
    at = source + (K * G + head) * D + every
    return q, two_halves(at, D), two_halves(at + K * D, D)


@triton.jit
def begin_row(
    token,
    weights,
    cos_sin,
    caches,
    place,
    owner,
    eps,
    qk_scale,
    GP: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """Norm and rotate the new token's query and key, write key and value, begin the softmax: q [GP, D] and state.

    place: the token's slot, -1 for none, its KV head, the caches' stride of a block, the places of half a head. owner:
    the token is this program's.
    """
    P: tl.constexpr = SHAPE[0]
    D: tl.constexpr = SHAPE[1]
    TILE: tl.constexpr = SHAPE[2]
    slot, head, block_stride, every = place
    GS: tl.constexpr = every.shape[0]
    target = slot // P * block_stride + head * (P * D) + slot % P * D + every
    written = owner & (slot >= 0) & (tl.arange(0, GS)[:, None] == 0) & (every >= 0)
    dtype: tl.constexpr = token[1][0].dtype
    q = _rope_halves(token[0], weights[0], cos_sin, eps, D, dtype)
    k = _rope_halves(token[1], weights[1], cos_sin, eps, D, dtype)
    v = token[2]
    tl.store(caches[0] + target, k[0], mask=written)
    tl.store(caches[0] + target + D // 2, k[1], mask=written)
    tl.store(caches[1] + target, v[0], mask=written)
    tl.store(caches[1] + target + D // 2, v[1], mask=written)
    s = q[0].to(tl.float32) * k[0].to(tl.float32) + q[1].to(tl.float32) * k[1].to(tl.float32)
    s = tl.where(owner, tl.sum(s, 1) * qk_scale, -float("inf"))
    m = tl.reshape(tl.broadcast_to(s[None, :], (GP // GS, GS)), (GP,))
    l = tl.where(owner & (tl.arange(0, TILE) == 0), 1.0, 0.0)
    acc = tl.where(owner, _whole(v, GP).to(tl.float32), 0.0)
    return _whole(q, GP), (m, tl.broadcast_to(l[None, :], (GP, TILE)), acc)


@triton.jit
def tile_pointers(table, start, head, block_stride, SHAPE: tl.constexpr):
    """Offsets [TILE, D] of the cached tokens from `start` on, which lie in one block."""
    P: tl.constexpr = SHAPE[0]
    D: tl.constexpr = SHAPE[1]
    block = tl.load(table + start // P).to(tl.int64)
    rows = start % P + tl.arange(0, SHAPE[2])
    return block * block_stride + head * (P * D) + rows[:, None] * D + tl.arange(0, D)[None, :]


@triton.jit
def prefetch_tiles(
    caches, table, begin, end, head, block_stride, SHAPE: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr
):
    """Ask for TILES tiles from token `begin` on, none at or beyond token `end`: of each tile a piece per warp."""
    P: tl.constexpr = SHAPE[0]
    D: tl.constexpr = SHAPE[1]
    TILE: tl.constexpr = SHAPE[2]
    PIECES: tl.constexpr = max(WARPS // 2, 1)  # of K, and of V
    piece = tl.arange(0, 64 * PIECES) // 32
    size: tl.constexpr = D * caches[0].dtype.element_ty.primitive_bitwidth // 8
    for tile in tl.static_range(TILES):
        start = begin + tile * TILE
        block = tl.load(table + start // P, mask=start < end, other=0).to(tl.int64)
        token = start + piece % PIECES * (TILE // PIECES)
        offset = block * block_stride + head * (P * D) + token % P * D
        tokens = tl.minimum(end - token, TILE // PIECES)
        prefetch_l2(tl.where(piece < PIECES, caches[0] + offset, caches[1] + offset), tokens * size)


@triton.jit
def tile_step(q, k, v, valid, state, qk_scale):
    """Online softmax over one tile [TILE, D] of keys and values. Sums stay apart by column: fewer exchanges."""
    m, l, acc = state
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * qk_scale
    s = tl.where(valid[None, :], s, -float("inf"))
    m_new = tl.maximum(m, tl.max(s, 1))
    alpha = tl.exp2(m - m_new)
    p = tl.exp2(s - m_new[:, None])
    l = l * alpha[:, None] + p
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
    return m_new, l, acc


@triton.jit
def attend(
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
    """Tiles first .. last of a row that has `past` tokens in the cache: q [GP, D] in the cache's dtype to the state."""
    TILE: tl.constexpr = SHAPE[2]
    for tile in tl.range(first, last, num_stages=STAGES):
        start = tile * TILE
        offsets = tile_pointers(table, start, head, block_stride, SHAPE)
        valid = start + tl.arange(0, TILE) < past
        k = tl.load(caches[0] + offsets, mask=valid[:, None], other=0.0)
        v = tl.load(caches[1] + offsets, mask=valid[:, None], other=0.0)
        state = tile_step(q, k, v, valid, state, qk_scale)
    return state


@triton.jit
def _combine(
    partial,
    stats,
    base,
    used,
    G: tl.constexpr,
    GS: tl.constexpr,
    D: tl.constexpr,
    MOST: tl.constexpr,
    MERGED: tl.constexpr,
):
    """Merge the first `used` parts from `base` on: [GS, D]. Reads bypass L1, which may hold an earlier layer's."""
    g = tl.arange(0, GS)
    d = tl.arange(0, D)
    s = tl.arange(0, MOST)
    known = (s < used)[:, None] & (g < G)[None, :]
    if MOST <= MERGED:  # everything is on its way before the first value is needed
        rows = (base + s)[:, None, None] * (G * D) + g[None, :, None] * D + d[None, None, :]
        part = tl.load(partial + rows, mask=known[:, :, None], other=0.0, cache_modifier=".cg")
    at = stats + (base + s)[:, None] * (2 * G) + g[None, :]
    m_SG = tl.load(at, mask=known, other=-float("inf"), cache_modifier=".cg")
    l_SG = tl.load(at + G, mask=known, other=0.0, cache_modifier=".cg")
    top = tl.max(m_SG, 0)
    top = tl.where(g < G, top, 0.0)
    weight = tl.exp2(m_SG - top[None, :])
    total = tl.sum(l_SG * weight, 0)
    if MOST <= MERGED:
        acc = tl.sum(part * weight[:, :, None], 0)
    else:
        acc = tl.zeros([GS, D], tl.float32)
        for start in range(0, used, MERGED):
            c = start + tl.arange(0, MERGED)
            here = (c < used)[:, None] & (g < G)[None, :]
            m = tl.load(
                stats + (base + c)[:, None] * (2 * G) + g[None, :], mask=here, other=-float("inf"), cache_modifier=".cg"
            )
            row = (base + c)[:, None, None] * (G * D) + g[None, :, None] * D + d[None, None, :]
            part = tl.load(partial + row, mask=here[:, :, None], other=0.0, cache_modifier=".cg")
            acc += tl.sum(part * tl.exp2(m - top[None, :])[:, :, None], 0)
    return acc / tl.where(g < G, total, 1.0)[:, None]


@triton.jit
def end_row(
    state,
    length,
    base,
    part,
    used,
    arrived,
    out,
    partial,
    stats,
    G: tl.constexpr,
    GS: tl.constexpr,
    MOST: tl.constexpr,
    MERGED: tl.constexpr,
):
    """Write a row's result for one KV head to `out`, where it is whole; else keep it as part number `part` of `used`
    that lie from `base` on in the scratch, and merge them if all have `arrived`."""
    m, l_columns, acc = state
    l = tl.sum(l_columns, 1)
    GP: tl.constexpr = acc.shape[0]
    D: tl.constexpr = acc.shape[1]
    g = tl.arange(0, GP)
    d = tl.arange(0, D)
    offsets = g[:, None] * D + d[None, :]
    in_group = (g < G)[:, None]
    if used == 1:
        result = acc * (1.0 / tl.where(length > 0, l, 1.0))[:, None]
        tl.store(out + offsets, result.to(out.dtype.element_ty), mask=in_group)
    else:
        tl.store(partial + (base + part) * (G * D) + offsets, acc, mask=in_group)
        at = stats + (base + part) * (2 * G) + g
        tl.store(at, m, mask=g < G)
        tl.store(at + G, l, mask=g < G)
        # All threads' stores come before the ticket, which one thread draws.
        tl.debug_barrier()
        ticket = tl.atomic_add(arrived, 1, sem="acq_rel")
        if ticket == used - 1:
            result = _combine(partial, stats, base, used, G, GS, D, MOST, MERGED)
            gs = tl.arange(0, GS)[:, None]
            tl.store(out + gs * D + d[None, :], result.to(out.dtype.element_ty), mask=gs < G)
            tl.store(arrived, 0)
