"""The CPU's operations against the reference: same numbers, same cache, whatever the batch is made of."""

from __future__ import annotations

import pytest
import torch

from tpqwen.kernels import cpu, ops, reference
from tpqwen.kernels.context import PrefillRows, StepContext
from tpqwen.worker.kv_cache import KVCache

BLOCK, KV_HEADS, HEAD_DIM, GROUP, NUM_BLOCKS, LAYERS = 4, 2, 8, 3, 40, 2
FUSED = (GROUP + 2) * KV_HEADS * HEAD_DIM
SCATTERED, CONSECUTIVE = [31, 7, 19, 4, 26, 11], [12, 13, 14, 15, 16, 17]


def new_cache(dtype: torch.dtype = torch.float32) -> KVCache:
    """Full of NaN, as blocks may be that another sequence left."""
    cache = KVCache(
        num_layers=LAYERS,
        num_blocks=NUM_BLOCKS,
        kv_heads=KV_HEADS,
        block_size=BLOCK,
        head_dim=HEAD_DIM,
        like=torch.empty(0, dtype=dtype),
    )
    cache.data.fill_(float("nan"))
    return cache


def context(
    cache: KVCache, decode: list[tuple[list[int], int]], chunks: list[tuple[list[int], int, int]]
) -> StepContext:
    """decode: (table, length with this token); chunks: (table, first position, tokens)."""
    spans = [(table, n - 1, 1) for table, n in decode] + chunks
    positions = [(table, p) for table, start, count in spans for p in range(start, start + count)]
    counts = [count for _, _, count in chunks]
    lengths = [start + count for _, start, count in chunks]
    prefill = PrefillRows(
        tables_CM=torch.tensor([table for table, _, _ in chunks], dtype=torch.int32),
        query_start=torch.tensor([sum(counts[:i]) for i in range(len(counts) + 1)], dtype=torch.int32),
        lengths_C=torch.tensor(lengths, dtype=torch.int32),
        num_query=tuple(counts),
        num_context=tuple(lengths),
    )
    angles = torch.arange(64)[:, None] * torch.logspace(0, -2, HEAD_DIM // 2)
    return StepContext(
        positions_T=torch.tensor([p for _, p in positions], dtype=torch.int32),
        cache_slots_T=torch.tensor([table[p // BLOCK] * BLOCK + p % BLOCK for table, p in positions]),
        num_decode=len(decode),
        tables_SM=torch.tensor([t for t, _ in decode], dtype=torch.int32).view(-1, len(SCATTERED)),
        decode_slots_B=torch.arange(len(decode)),
        decode_lengths_B=torch.tensor([n for _, n in decode], dtype=torch.int32),
        prefill=prefill if chunks else None,
        k_cache=cache.k,
        v_cache=cache.v,
        cos_sin=torch.cat((angles.cos(), angles.sin()), -1),
    )


def assert_steps_equal(steps, dtype: torch.dtype = torch.float32) -> None:
    """Run the steps with both implementations, each on a cache of its own."""
    generator = torch.Generator().manual_seed(0)
    q_norm, k_norm = (torch.rand(2, HEAD_DIM, generator=generator) + 0.5).to(dtype)
    tolerance = {"atol": 1e-6, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.02, "rtol": 0.02}
    mine, theirs = new_cache(dtype), new_cache(dtype)
    for decode, chunks in steps:
        ctx, expected_ctx = context(mine, decode, chunks), context(theirs, decode, chunks)
        for layer in range(LAYERS):
            qkv = torch.randn(len(ctx.positions_T), FUSED, generator=generator).to(dtype)
            out = ops.attend(qkv, q_norm, k_norm, 1e-6, layer, ctx, 0.3)
            expected = reference.attend(qkv, q_norm, k_norm, 1e-6, layer, expected_ctx, 0.3)
            assert out.dtype == dtype
            torch.testing.assert_close(out, expected, **tolerance)
            slots = ctx.cache_slots_T
            for cache, other in ((mine.k, theirs.k), (mine.v, theirs.v)):
                written, wanted = (c[layer][slots // BLOCK, :, slots % BLOCK] for c in (cache, other))
                torch.testing.assert_close(written, wanted, **tolerance)


MIXED = [
    ([], [(SCATTERED, 0, 5), (CONSECUTIVE, 0, 8)]),
    ([(CONSECUTIVE, 9)], [(SCATTERED, 5, 6), ([1, 2, 0, 0, 0, 0], 0, 1)]),
    ([(CONSECUTIVE, 10), (SCATTERED, 12), ([1, 2, 33, 33, 33, 33], 2)], []),
    ([(CONSECUTIVE, 11), (SCATTERED, 13), ([1, 2, 33, 33, 33, 33], 3)], [([20, 21, 0, 0, 0, 0], 0, 3)]),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limit", [1, 200, 1 << 18])
def test_attend_equals_the_reference_in_every_mixture(monkeypatch, limit, dtype):
    monkeypatch.setattr(cpu, "GATHER_ELEMENTS", limit)
    assert_steps_equal(MIXED, dtype)


def test_consecutive_blocks_are_read_in_place_and_scattered_ones_gathered():
    cache = new_cache()
    for table, length, in_place in ((CONSECUTIVE, 9, True), (SCATTERED, 9, False), ([5, 6, 7, 0, 0, 0], 12, True)):
        (read,) = cpu.make_plan(context(cache, [(table, length)], [])).reads
        assert isinstance(read.blocks, slice) == in_place
        assert read.mask is None


def test_a_step_is_planned_once_for_all_layers(monkeypatch):
    planned = []
    make_plan = cpu.make_plan
    monkeypatch.setattr(cpu, "make_plan", lambda ctx: planned.append(ctx) or make_plan(ctx))
    assert_steps_equal(MIXED[:1])
    assert len(planned) == 1


def test_a_finished_sequences_nan_does_not_reach_the_next_owner_of_its_block():
    """Rows of different lengths are read together, so the shorter one's last block is read beyond its end."""
    assert_steps_equal(
        [([], [([3, 0, 0, 0, 0, 0], 0, 1), (SCATTERED, 0, 12)]), ([([3, 0, 0, 0, 0, 0], 2), (SCATTERED, 13)], [])]
    )


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("hidden", [8, cpu.ONEDNN_FROM // 1024])
def test_products_equal_the_reference_small_and_by_onednn(rows, hidden):
    generator = torch.Generator().manual_seed(1)
    h, norm = torch.randn(rows, hidden, generator=generator), torch.rand(hidden, generator=generator)
    weight = torch.randn(1024, hidden, generator=generator) / hidden**0.5
    residual = torch.randn(rows, 1024, generator=generator)
    before = residual.clone()
    tolerance = {"atol": 1e-5, "rtol": 1e-5}
    for name, args in {
        "linear": (h, weight),
        "norm_linear": (h, norm, 1e-6, weight),
        "norm_gate_up": (h, norm, 1e-6, weight),
        "linear_add": (h, weight, residual),
    }.items():
        torch.testing.assert_close(getattr(ops, name)(*args), getattr(reference, name)(*args), **tolerance)
    assert torch.equal(residual, before)


def test_large_products_go_to_onednn_and_do_without_it(monkeypatch):
    h, weight = torch.randn(2, 1024), torch.randn(1024, 1024)
    expected = h @ weight.T
    for onednn in (lambda *_: expected, None):
        monkeypatch.setattr(cpu, "_ONEDNN_LINEAR", onednn)
        torch.testing.assert_close(ops.linear(h, weight), expected, atol=1e-4, rtol=1e-5)
    monkeypatch.setattr(cpu, "_ONEDNN_LINEAR", lambda *_: "oneDNN")
    assert ops.linear(h, weight) == "oneDNN"
    assert ops.linear(h, weight[:100]) != "oneDNN"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_rounds_where_the_reference_does(dtype):
    generator = torch.Generator().manual_seed(2)
    x, weight = (torch.randn(7, 64, generator=generator) * 3).to(dtype), torch.rand(64, generator=generator).to(dtype)
    torch.testing.assert_close(ops.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))
