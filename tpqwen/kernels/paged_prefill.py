"""Causal attention of chunks of prompts over the paged cache, in one launch: tiles of queries, split over their keys.

T tokens, C chunks, N query heads, K key/value heads, G = N / K, D head size, P block size, M table width, S splits.
Caches are [blocks, K, P, D]. The grid follows from T and C alone and lengths are read on the device, so a captured CUDA
graph holds for every length. Few queries far behind in their context would be few programs with a long way each; they
are split over their keys, as in Flash-Decoding (Dao et al., 2023).
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from tpqwen.kernels.launch import fitting_stages, launch_options, release_next, wait_previous

PROGRAMS = 264  # that fill a large GPU: two on each of 132 multiprocessors
MAX_SPLITS = 16
MIN_TILES = 8  # of keys, below which a split costs more than it saves
SPLIT_ROWS = 4096  # tokens times splits that the scratch holds
MAX_CHUNKS = 1024  # of a pass that is split
COMPILED_CHUNKS = 64  # what the kernel is compiled for, unless there are more: one for all passes that have a graph


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


class PrefillScratch(NamedTuple):
    """Partial results of split tiles, and arrival counters: all zero between launches. Of one stream at a time."""

    partial: torch.Tensor  # fp32 [SPLIT_ROWS, N, D] sums
    stats: torch.Tensor  # fp32 [SPLIT_ROWS, N, 2] maxima and sums of the softmax
    arrived: torch.Tensor  # int32 [tiles * N]


def prefill_scratch(num_heads: int, head_dim: int, device: torch.device) -> PrefillScratch:
    """Scratch that suffices for every pass that is split."""
    return PrefillScratch(
        torch.empty((SPLIT_ROWS, num_heads, head_dim), dtype=torch.float32, device=device),
        torch.empty((SPLIT_ROWS, num_heads, 2), dtype=torch.float32, device=device),
        torch.zeros((SPLIT_ROWS // 2 // 16 + MAX_CHUNKS + 1) * num_heads, dtype=torch.int32, device=device),
    )


def num_splits(num_tokens: int, num_heads: int, queries: int) -> int:
    """Splits of a pass over T tokens in tiles of `queries`: as many as make enough programs, a power of two."""
    wanted: int = PROGRAMS // (num_heads * -(-num_tokens // queries))
    return 1 << (max(1, min(MAX_SPLITS, SPLIT_ROWS // num_tokens, wanted)).bit_length() - 1)


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
        # A row may see no key of a split's only tiles.
        safe = tl.where(m_new == -float("inf"), 0.0, m_new) if MASK else m_new
        p = tl.exp2(s * qk_scale - safe[:, None])
        alpha = tl.exp2(m - safe)
        l = l * alpha + tl.sum(p, 1)
        v = _load_tile(caches[1], table, start, head, stop, block_stride, SHAPE, TMA, MASK)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
        m = m_new
    return m, l, acc


@triton.jit
def _merge(scratch, first, used, inside, N: tl.constexpr, D: tl.constexpr, S: tl.constexpr):
    """Merge the first `used` splits of the rows `inside`, whose partial results begin at `first` [R]: [R, D].

    Reads bypass L1, which may hold an earlier layer's.
    """
    d = tl.arange(0, D)[None, :]
    s = tl.arange(0, S)[None, :]
    at = scratch[1] + (first[:, None] + s * N) * 2
    known = inside[:, None] & (s < used)
    m_RS = tl.load(at, mask=known, other=-float("inf"), cache_modifier=".cg")
    l_RS = tl.load(at + 1, mask=known, other=0.0, cache_modifier=".cg")
    top = tl.max(m_RS, 1)
    top = tl.where(top == -float("inf"), 0.0, top)
    total = tl.sum(l_RS * tl.exp2(m_RS - top[:, None]), 1)
    acc = tl.zeros([first.shape[0], D], tl.float32)
    for split in tl.range(0, used):
        row = first + split * N
        m = tl.load(scratch[1] + row * 2, mask=inside, other=0.0, cache_modifier=".cg")
        part = tl.load(scratch[0] + row[:, None] * D + d, mask=inside[:, None], other=0.0, cache_modifier=".cg")
        acc += part * tl.exp2(m - top)[:, None]
    return acc / tl.where(inside, total, 1.0)[:, None]


@triton.jit(
    do_not_specialize=["num_tokens", "num_chunks", "skip_from"],
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
    partial,
    stats,
    arrived,
    qk_scale,
    num_tokens,
    num_chunks,
    skip_from,
    q_stride,
    table_stride,
    block_stride,
    SHAPE: tl.constexpr,
    G: tl.constexpr,
    QUERIES: tl.constexpr,
    STAGES: tl.constexpr,
    CHUNKS: tl.constexpr,
    TMA: tl.constexpr,
    S: tl.constexpr,
    MIN_TILES: tl.constexpr,
    PDL: tl.constexpr,
):
    """One (query head, tile of one chunk's queries, split). Long tiles come first: the last positions see most keys."""
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
        skipped = (skip_from > 0) & (count == length) & (count >= skip_from)
        seen_by_all = length - count + first_row + 1
        stop = tl.minimum(length, seen_by_all + QUERIES - 1)
        end = tl.cdiv(stop, SHAPE[3])
        per_split = tl.maximum(tl.cdiv(end, S), MIN_TILES) if S > 1 else end
        used = tl.cdiv(end, per_split) if S > 1 else 1
        split = tl.program_id(2)
        if (first_row < count) & (skipped == 0) & (split < used):
            position = length - count + row
            table = tables + chunk.to(tl.int64) * table_stride
            head = query_head // G
            at = (begin + row).to(tl.int64)[:, None]
            inside = row < count
            valid = inside[:, None]
            queries = tl.load(q + at * q_stride + query_head * D + d, mask=valid, other=0.0)
            m = tl.full([QUERIES], -float("inf"), tl.float32)
            l = tl.zeros([QUERIES], tl.float32)
            acc = tl.zeros([QUERIES, D], tl.float32)
            first = split * per_split
            last = tl.minimum(first + per_split, end)
            whole = tl.minimum(seen_by_all // SHAPE[3], last)
            caches = (k_cache, v_cache)
            state = _tiles(
                queries, (m, l, acc), caches, table, first, whole, position, head, length, block_stride, qk_scale,
                SHAPE, STAGES, TMA, False
            )  # fmt: skip
            m, l, acc = _tiles(
                queries, state, caches, table, tl.maximum(first, whole), last, position, head, length, block_stride,
                qk_scale, SHAPE, STAGES, TMA, True
            )  # fmt: skip
            target = out + at * (K * G * D) + query_head * D + d
            if used == 1:
                tl.store(target, (acc / l[:, None]).to(out.dtype.element_ty), mask=valid)
            else:
                first_part = (begin + row) * (S * K * G) + query_head
                part = first_part + split * (K * G)
                tl.store(partial + part[:, None] * D + d, acc, mask=valid)
                tl.store(stats + part * 2, m, mask=inside)
                tl.store(stats + part * 2 + 1, l, mask=inside)
                # All threads' stores come before the ticket, which one thread draws.
                tl.debug_barrier()
                counter = arrived + tile * (K * G) + query_head
                ticket = tl.atomic_add(counter, 1, sem="acq_rel")
                if ticket == used - 1:
                    result = _merge((partial, stats), first_part, used, inside, K * G, D, S)
                    tl.store(target, result.to(out.dtype.element_ty), mask=valid)
                    tl.store(counter, 0)
    elif tl.program_id(2) == 0:
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
    scratch: PrefillScratch | None = None,
    out: torch.Tensor | None = None,
    plan: PrefillPlan | None = None,
) -> torch.Tensor:
    """reference.paged_prefill: causal attention of chunks whose keys are already in the cache, [T, N, D].

    max_query only serves to take smaller tiles when every chunk is short. Chunks of at least skip_from > 0 tokens that
    are their whole context are left out: their rows are not written. Without scratch nothing is split over keys.
    """
    num_tokens, num_heads, head_dim = q_TND.shape
    _, kv_heads, block_size, _ = k_cache.shape
    plan = plan or PLANS.get(head_dim, SMALL_PLAN)
    queries = 16 if max_query <= 16 else plan.queries  # one of the two: each is a kernel to compile for every S
    keys, token_bytes = min(plan.keys, block_size), head_dim * k_cache.itemsize
    num_chunks = len(lengths_C)
    assert k_cache.is_contiguous() and v_cache.is_contiguous() and q_TND.stride()[1:] == (head_dim, 1)
    out = torch.empty_like(q_TND, memory_format=torch.contiguous_format) if out is None else out
    k, v = _descriptors((k_cache, v_cache), keys) if plan.tma else (k_cache, v_cache)
    splits = num_splits(num_tokens, num_heads, queries) if scratch is not None and num_chunks < MAX_CHUNKS else 1
    _prefill_kernel[(num_heads, num_tokens // queries + num_chunks + 1, splits)](
        q_TND,
        k,
        v,
        tables_CM,
        query_start,
        lengths_C,
        out,
        *(scratch or (out, out, out)),
        scale * math.log2(math.e),
        num_tokens,
        num_chunks,
        skip_from,
        q_TND.stride(0),
        tables_CM.stride(0),
        k_cache.stride(0),
        SHAPE=(kv_heads, block_size, head_dim, keys),
        G=num_heads // kv_heads,
        QUERIES=queries,
        STAGES=fitting_stages(plan.stages, 2 * keys * token_bytes, queries * token_bytes),
        CHUNKS=max(COMPILED_CHUNKS, triton.next_power_of_2(num_chunks + 1)),
        TMA=plan.tma,
        S=splits,
        MIN_TILES=MIN_TILES,
        num_warps=plan.warps if queries == plan.queries else 4,
        **launch_options(q_TND.device),
    )
    return out
