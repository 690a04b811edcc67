"""The attention kernels against kernels/reference.py computed in float64, by relative error.

Inputs are fresh and random, outputs and scratch start as NaN, and so does every cache position that must not be read.
On a GPU the kernels run in bfloat16; in the interpreter in float32 (its bfloat16 products are not right).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch

from tpqwen.kernels import attention, cuda, paged_prefill, prefill, reference
from tpqwen.kernels.attention_table import (
    ENOUGH_SPLITS,
    MAX_SPLITS,
    DecodePlan,
    decode_plan,
    has_wide,
    num_parts,
    num_splits,
)
from tpqwen.kernels.context import StepContext
from tpqwen.kernels.launch import launch_options, pdl_supported

NAN = float("nan")
EPS = 1e-6
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 1.5e-2}
WHOLE = DecodePlan(tile=16, warps=4, stages=1, programs=1, min_tiles=1)
SPLIT = DecodePlan(tile=16, warps=4, stages=3, programs=48, min_tiles=1, prefetch=4)
FINE = DecodePlan(tile=16, warps=4, stages=1, programs=128, min_tiles=1)
COARSE = DecodePlan(tile=32, warps=4, stages=5, programs=24, min_tiles=2)
FEW_SPLITS = DecodePlan(tile=16, warps=4, stages=2, programs=96, min_tiles=4)
EVEN = DecodePlan(tile=16, warps=4, stages=2, programs=7, even=True)


@dataclass
class Paged:
    """A cache of random sequences: blocks in random order, NaN wherever no token is."""

    k: torch.Tensor
    v: torch.Tensor
    tables: torch.Tensor
    slots: list[torch.Tensor]  # per sequence, of each token


@pytest.fixture
def dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def paged(
    lengths: list[int], kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> Paged:
    """Block 0 and every unused position are NaN; unused table entries name block 0."""
    width = max(1, -(-max(lengths) // block_size)) + 1
    ids = (torch.randperm(len(lengths) * width) + 1).view(len(lengths), width)
    shape = (len(lengths) * width + 1, kv_heads, block_size, head_dim)
    k, v = torch.full(shape, NAN), torch.full(shape, NAN)
    tables, slots = torch.zeros(len(lengths), width, dtype=torch.int32), []
    for row, length in enumerate(lengths):
        used = -(-length // block_size)
        tables[row, :used] = ids[row, :used].int()
        where = torch.arange(length)
        blocks, offsets = ids[row][where // block_size], where % block_size
        k[blocks, :, offsets] = torch.randn(length, kv_heads, head_dim)
        v[blocks, :, offsets] = torch.randn(length, kv_heads, head_dim)
        slots.append((blocks * block_size + offsets).to(device))
    return Paged(k.to(device, dtype), v.to(device, dtype), tables.to(device), slots)


def clean(cache: Paged) -> tuple[torch.Tensor, torch.Tensor]:
    """What the reference gets: float64, and zeros in place of NaN."""
    return cache.k.double().nan_to_num(), cache.v.double().nan_to_num()


def norm_inputs(head_dim: int, positions: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, ...]:
    angles = torch.rand(positions, head_dim // 2) * 6
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1).to(device)
    return *((torch.rand(head_dim) + 0.5).to(device, dtype) for _ in range(2)), cos_sin


def error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """||value - expected|| / ||expected||; NaN in places that must not have any shows as NaN, which no bound passes."""
    value, expected = value.double(), expected.double()
    return float((value - expected).norm() / expected.norm())


def forget_last_token(cache: Paged, lengths: list[int]) -> torch.Tensor:
    """NaN at each sequence's last position, as before its step; returns the slots of those positions, -1 for none."""
    last = torch.tensor([int(s[-1]) if length else -1 for s, length in zip(cache.slots, lengths, strict=True)])
    size = cache.k.shape[2]
    for slot in last[last >= 0].tolist():
        cache.k[slot // size, :, slot % size] = NAN
        cache.v[slot // size, :, slot % size] = NAN
    return last.to(cache.k.device)


@pytest.mark.parametrize(
    ("group", "kv_heads", "head_dim", "block_size", "plan", "lengths"),
    [
        (2, 2, 32, 16, WHOLE, [1, 15, 16, 17, 0, 50]),
        (2, 2, 32, 16, SPLIT, [2, 17, 18, 0, 90]),
        (1, 2, 16, 32, SPLIT, [1, 32, 33, 34, 70]),
        (2, 2, 16, 16, SPLIT, [16, 17, 0, 65]),
        (4, 1, 32, 64, COARSE, [1, 63, 64, 65, 66, 0, 200]),
        (5, 2, 64, 16, SPLIT, [1, 17, 0, 40]),
        (8, 1, 128, 64, COARSE, [64, 65, 130]),
        (16, 1, 16, 16, SPLIT, [1, 33, 0]),
        (2, 2, 32, 16, SPLIT._replace(hold=True), [1, 17, 18, 0, 90]),
        (4, 1, 32, 64, COARSE._replace(hold=True), [1, 33, 0, 200]),
        (2, 1, 16, 16, FINE, [520, 3]),  # a long row beside a short one: every split is used
        (2, 2, 32, 16, FEW_SPLITS, [64, 700, 1, 65, 0, 66]),  # one among rows that stay whole, or just do not
        (2, 2, 32, 16, FEW_SPLITS._replace(hold=True), [3, 0, 530, 64]),
        (2, 2, 32, 16, EVEN, [1, 15, 0, 16, 17, 50]),
        (2, 2, 32, 16, EVEN._replace(programs=1), [2, 0, 17]),
        (4, 1, 32, 64, EVEN._replace(tile=32), [1, 63, 64, 65, 66, 0, 200]),
        (5, 2, 64, 16, EVEN._replace(programs=40), [17, 0, 40]),  # more programs than tiles
        (8, 1, 128, 64, EVEN._replace(tile=64, programs=3), [64, 65, 130]),
        (2, 1, 16, 16, EVEN._replace(programs=24), [520, 3]),  # a row of more parts than are merged at a time
        (2, 8, 16, 32, EVEN, [0, 0, 1]),
    ],
)
def test_decode_attention_equals_the_reference_and_writes_only_the_new_token(
    group: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    plan: DecodePlan,
    lengths: list[int],
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(len(lengths) * group + head_dim)
    cache = paged(lengths, kv_heads, block_size, head_dim, dtype, device)
    slots = forget_last_token(cache, lengths)
    q_norm, k_norm, cos_sin = norm_inputs(head_dim, max(lengths), dtype, device)
    lengths_B = torch.tensor(lengths, dtype=torch.int32, device=device)
    positions = (lengths_B - 1).clamp(min=0)
    batch, heads, scale = len(lengths), group * kv_heads, head_dim**-0.5
    qkv = torch.randn(batch, (heads + 2 * kv_heads) * head_dim, device=device).to(dtype)
    k64, v64 = cache.k.double(), cache.v.double()
    q64 = reference.qk_norm_rope_write(
        qkv.double(), q_norm.double(), k_norm.double(), EPS, cos_sin, positions, k64, v64, slots
    )
    expected = reference.paged_decode(q64, k64.nan_to_num(), v64.nan_to_num(), cache.tables, lengths_B, scale)
    scratch = attention.decode_scratch(batch, kv_heads, group, head_dim, device, plan)
    scratch.partial.fill_(NAN)
    scratch.stats.fill_(NAN)
    table_rows = torch.randperm(batch).int().to(device)  # rows lie in any order in the table of all slots
    tables = torch.empty_like(cache.tables)
    tables[table_rows.long()] = cache.tables
    for _ in range(2):  # the second launch finds the first one's counters and a written token, as a replayed graph does
        out = torch.full((batch, heads * head_dim), NAN, dtype=dtype, device=device)
        attention.decode_attention(
            qkv,
            q_norm,
            k_norm,
            EPS,
            cos_sin,
            positions,
            cache.k,
            cache.v,
            slots,
            tables,
            table_rows,
            lengths_B,
            scale,
            scratch,
            out=out,
            plan=plan,
        )
        assert error(out.view_as(expected), expected) < TOLERANCE[dtype]
        assert not out.view_as(expected)[lengths_B == 0].any()
        assert not scratch.arrived.any()
    for ours, theirs in ((cache.k, k64), (cache.v, v64)):
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert error(ours.nan_to_num(), theirs.nan_to_num()) < TOLERANCE[dtype]


@pytest.mark.parametrize("wide", [False, True])
def test_a_step_with_a_long_row_attends_by_the_wide_plan(
    wide: bool, device: torch.device, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(3)
    group, kv_heads, head_dim, size, batch = 2, 2, 16, 64, 48
    lengths = [0] * 44 + [3200, 3, 1025, 70]
    cache = paged(lengths, kv_heads, size, head_dim, dtype, device)
    slots = forget_last_token(cache, lengths)
    q_norm, k_norm, cos_sin = norm_inputs(head_dim, max(lengths), dtype, device)
    lengths_B = torch.tensor(lengths, dtype=torch.int32, device=device)
    qkv = torch.randn(batch, (group + 2) * kv_heads * head_dim, device=device).to(dtype)
    ctx = StepContext(
        positions_T=(lengths_B - 1).clamp(min=0),
        cache_slots_T=slots,
        num_decode=batch,
        tables_SM=cache.tables,
        decode_slots_B=torch.arange(batch, dtype=torch.int32, device=device),
        decode_lengths_B=lengths_B,
        prefill=None,
        k_cache=[cache.k],
        v_cache=[cache.v],
        cos_sin=cos_sin,
        wide=wide,
    )
    k64, v64 = cache.k.double(), cache.v.double()
    where = (EPS, cos_sin, ctx.positions_T, k64, v64, slots)
    q64 = reference.qk_norm_rope_write(qkv.double(), q_norm.double(), k_norm.double(), *where)
    expected = reference.paged_decode(q64, k64.nan_to_num(), v64.nan_to_num(), cache.tables, lengths_B, 0.25)
    scratch = attention.decode_scratch(batch, kv_heads, group, head_dim, device)
    for part in (scratch.partial, scratch.stats):
        part.fill_(NAN)
    monkeypatch.setattr(cuda, "_scratch", lambda *_: scratch)
    out = cuda.attend(qkv, q_norm, k_norm, EPS, 0, ctx, 0.25)
    assert error(out.view_as(expected), expected) < TOLERANCE[dtype]
    assert not out[:44].any() and not scratch.arrived.any()
    parts = int((~scratch.stats[:, 0, 0].isnan()).sum())
    assert parts == kv_heads * (50 + 16 + 2 if wide else 3 + 3 + 2), "a tile in each program, or each row in three"


@pytest.mark.parametrize(
    ("group", "kv_heads", "head_dim", "tokens"), [(1, 2, 16, 5), (2, 2, 32, 33), (5, 1, 64, 16), (8, 1, 128, 3)]
)
def test_qk_norm_rope_write_equals_the_reference(
    group: int, kv_heads: int, head_dim: int, tokens: int, device: torch.device, dtype: torch.dtype
) -> None:
    torch.manual_seed(tokens)
    q_norm, k_norm, cos_sin = norm_inputs(head_dim, 40, dtype, device)
    positions = torch.randint(0, 40, (tokens,), dtype=torch.int32, device=device)
    slots = torch.randperm(6 * 16)[:tokens].to(device)
    slots[tokens // 2] = -1
    qkv = torch.randn(tokens, (group + 2) * kv_heads * head_dim, device=device).to(dtype)
    shape = (6, kv_heads, 16, head_dim)
    k64, v64 = (torch.full(shape, NAN, dtype=torch.float64, device=device) for _ in range(2))
    k, v = (torch.full(shape, NAN, dtype=dtype, device=device) for _ in range(2))
    keys = torch.full((tokens, kv_heads, head_dim), NAN, dtype=dtype, device=device)
    expected = reference.qk_norm_rope_write(
        qkv.double(), q_norm.double(), k_norm.double(), EPS, cos_sin, positions, k64, v64, slots
    )
    q = prefill.qk_norm_rope_write(qkv, q_norm, k_norm, EPS, cos_sin, positions, k, v, slots, k_out=keys)
    assert error(q, expected) < TOLERANCE[dtype]
    for ours, theirs in ((k, k64), (v, v64)):
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert error(ours.nan_to_num(), theirs.nan_to_num()) < TOLERANCE[dtype]
    written = slots >= 0
    torch.testing.assert_close(keys[written], k[slots[written] // 16, :, slots[written] % 16], rtol=0, atol=0)
    assert not keys.isnan().any()


SMALL = paged_prefill.PrefillPlan(queries=16, keys=16, warps=4, stages=2, tma=False)
CHUNKS = [  # (tokens of the chunk, tokens in the cache with it)
    [(40, 40)],
    [(5, 5), (33, 70), (0, 16), (1, 33), (16, 48)],
    [(20, 53), (3, 3)],
]


def chunked(
    chunks: list[tuple[int, int]], group: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Paged, torch.Tensor, list[int], list[int]]:
    lengths = [length for _, length in chunks]
    starts = [0]
    for count, _ in chunks:
        starts.append(starts[-1] + count)
    q = torch.randn(starts[-1] + 3, group * kv_heads, head_dim, device=device).to(dtype)
    return paged(lengths, kv_heads, 16, head_dim, dtype, device), q, starts, lengths


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize(
    ("group", "kv_heads", "head_dim", "tma"), [(2, 2, 16, False), (5, 1, 64, False), (2, 1, 32, True)]
)
def test_paged_prefill_equals_the_reference(
    chunks: list[tuple[int, int]],
    group: int,
    kv_heads: int,
    head_dim: int,
    tma: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(len(chunks) + group)
    cache, q, starts, lengths = chunked(chunks, group, kv_heads, head_dim, dtype, device)
    starts_C, lengths_C = (torch.tensor(x, dtype=torch.int32, device=device) for x in (starts, lengths))
    expected = reference.paged_prefill(q.double(), *clean(cache), cache.tables, starts_C, lengths_C, 64, 0.3)
    plan = SMALL._replace(tma=tma)
    out = torch.full_like(q, NAN)
    paged_prefill.paged_prefill(q, cache.k, cache.v, cache.tables, starts_C, lengths_C, 64, 0.3, out=out, plan=plan)
    assert error(out, expected) < TOLERANCE[dtype]
    assert not out[starts[-1] :].any()


@pytest.mark.parametrize(("chunks", "tma"), [([(5, 700)], False), ([(20, 331), (40, 40), (1, 257)], True)])
def test_prefill_split_over_keys_equals_the_reference(
    chunks: list[tuple[int, int]], tma: bool, device: torch.device, dtype: torch.dtype
) -> None:
    torch.manual_seed(len(chunks))
    cache, q, starts, lengths = chunked(chunks, 2, 2, 16, dtype, device)
    starts_C, lengths_C = (torch.tensor(x, dtype=torch.int32, device=device) for x in (starts, lengths))
    expected = reference.paged_prefill(q.double(), *clean(cache), cache.tables, starts_C, lengths_C, 64, 0.3)
    scratch = paged_prefill.prefill_scratch(4, 16, device)
    assert paged_prefill.num_splits(len(q), 4, 16) > 1
    rows = (cache.tables, starts_C, lengths_C, 64, 0.3)
    for _ in range(2):  # the counters are left as they were found
        scratch.partial.fill_(NAN)
        scratch.stats.fill_(NAN)
        out = torch.full_like(q, NAN)
        paged_prefill.paged_prefill(q, cache.k, cache.v, *rows, out=out, plan=SMALL._replace(tma=tma), scratch=scratch)
        assert error(out, expected) < TOLERANCE[dtype]
        assert not out[starts[-1] :].any()
        assert not scratch.arrived.any()
        assert not scratch.stats[: 2 * len(chunks)].isnan().all(), "nothing was split"


@pytest.mark.parametrize("num_heads", [1, 4, 16, 64])
def test_splits_fit_into_the_scratch(num_heads: int) -> None:
    for tokens in range(1, 3000):
        splits = paged_prefill.num_splits(tokens, num_heads, 64)
        assert splits == 1 or splits * tokens <= paged_prefill.SPLIT_ROWS
        assert splits * num_heads * -(-tokens // 64) <= max(paged_prefill.PROGRAMS, num_heads * -(-tokens // 64))


def test_paged_prefill_leaves_out_long_whole_prompts(device: torch.device, dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    chunks = [(33, 33), (20, 53), (5, 5)]
    cache, q, starts, lengths = chunked(chunks, 2, 2, 32, dtype, device)
    starts_C, lengths_C = (torch.tensor(x, dtype=torch.int32, device=device) for x in (starts, lengths))
    expected = reference.paged_prefill(q.double(), *clean(cache), cache.tables, starts_C, lengths_C, 64, 0.3)
    out = torch.full_like(q, NAN)
    rows = (cache.tables, starts_C, lengths_C, 64, 0.3)
    paged_prefill.paged_prefill(q, cache.k, cache.v, *rows, out=out, plan=SMALL, skip_from=33)
    assert out[:33].isnan().all()
    assert error(out[33:], expected[33:]) < TOLERANCE[dtype]


@pytest.mark.parametrize("starts", [[0, 9], [0, 8, 16, 24], [0, 3, 20, 21]])
def test_fresh_prefill_equals_the_reference(starts: list[int], device: torch.device, dtype: torch.dtype) -> None:
    torch.manual_seed(11)
    total, kv_heads, head_dim = starts[-1] + 2, 2, 32
    qkv = torch.randn(total, 4 * kv_heads, head_dim, device=device).to(dtype)
    q, k, v = qkv.split((2 * kv_heads, kv_heads, kv_heads), dim=1)
    expected = torch.zeros(total, 2 * kv_heads, head_dim, dtype=torch.float64, device=device)
    for a, b in itertools.pairwise(starts):
        q64, k64, v64 = (x[None, a:b].transpose(1, 2).double() for x in (q, k, v))
        attended = torch.nn.functional.scaled_dot_product_attention(q64, k64, v64, is_causal=True, enable_gqa=True)
        expected[a:b] = attended[0].transpose(0, 1)
    out = prefill.fresh_prefill(q, k, v, starts, head_dim**-0.5)
    assert error(out, expected) < TOLERANCE[dtype]
    assert not out[starts[-1] :].any()


SHAPES = [(2, 128, 8), (2, 128, 1), (4, 128, 8), (5, 64, 3), (8, 128, 2)]  # G, D, K


@pytest.mark.parametrize(("group", "head_dim", "kv_heads"), SHAPES)
def test_scratch_suffices_for_every_batch(group: int, head_dim: int, kv_heads: int, device: torch.device) -> None:
    scratch = attention.decode_scratch(600, kv_heads, group, head_dim, device)
    for batch, wide in itertools.product(range(1, 601), (False, True)):
        plan = decode_plan(batch, kv_heads, group, head_dim, wide=wide)
        assert 1 <= num_splits(plan, batch * kv_heads) <= MAX_SPLITS
        assert num_parts(plan, batch * kv_heads) <= len(scratch.partial)
    assert len(scratch.arrived) == 600 * kv_heads
    assert len(scratch.partial) <= 8192


def most_tiles(lengths: list[int], plan: DecodePlan, kv_heads: int) -> int:
    """Tiles of the program that has most, as the kernels divide them."""
    tiles = [-(-(length - 1) // plan.tile) for length in lengths]
    if plan.even:
        return -(-kv_heads * sum(tiles) // plan.programs)
    splits = num_splits(plan, len(lengths) * kv_heads)
    return max(max(-(-count // splits), plan.min_tiles) if splits > 1 else count for count in tiles)


@pytest.mark.parametrize("batch", [16, 33, 96, 256, 512])
def test_no_program_has_a_long_row_alone(batch: int) -> None:
    lengths = [300] * (batch - 1) + [32_500]
    usual, wide = (decode_plan(batch, 8, 2, 128, wide=w) for w in (False, True))
    assert 4 * most_tiles(lengths, wide, 8) * wide.tile < most_tiles(lengths, usual, 8) * usual.tile


def test_the_usual_plan_does_not_know_of_long_rows() -> None:
    assert [num_splits(decode_plan(b, 8, 2, 128), b * 8) for b in (1, 4, 8, 16, 24, 33, 48, 96, 256)] == [
        *(32, 16, 6, 2, 2, 1, 1, 1, 1)
    ]


@pytest.mark.parametrize("group", [2, 4, 8])
@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
def test_few_heads_of_many_rows_are_still_programs_enough(kv_heads: int, group: int) -> None:
    for batch in range(25, 600):
        pairs = batch * kv_heads
        splits = num_splits(decode_plan(batch, kv_heads, group, 128), pairs)
        assert pairs * splits >= 132
        assert splits == 1 or kv_heads < 8, "where it was measured rows stay whole"


@pytest.mark.parametrize(("group", "head_dim", "kv_heads"), SHAPES)
def test_a_wide_plan_divides_evenly_or_there_is_none(group: int, head_dim: int, kv_heads: int) -> None:
    assert not has_wide(0, kv_heads, group, head_dim)
    for batch in range(1, 600):
        usual, wide = (decode_plan(batch, kv_heads, group, head_dim, wide=w) for w in (False, True))
        has = num_splits(usual, batch * kv_heads) < ENOUGH_SPLITS
        assert has_wide(batch, kv_heads, group, head_dim) == has
        assert wide.even if has else wide == usual


def test_dependent_launch_is_asked_for_only_on_hopper_and_later(device: torch.device) -> None:
    assert launch_options(torch.device("cpu")) == {"PDL": False}
    if device.type == "cuda":
        assert pdl_supported(device) == (torch.cuda.get_device_capability() >= (9, 0))
        assert launch_options(device).get("launch_pdl", False) == pdl_supported(device)
