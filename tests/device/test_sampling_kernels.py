"""Sampling kernels against the reference: random words, noise, arg-max, the fused head and top candidates."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from tpqwen.kernels import reference, sampling
from tpqwen.kernels.context import SlotTensors
from tpqwen.kernels.noise import group_noise, gumbel, random_words, tile_noise

EPS = 1e-6


@triton.jit
def words_kernel(seeds, out_index, choices, words, noise, first_group, GROUPS: tl.constexpr):
    row = tl.program_id(0)
    seed, index, choice = tl.load(seeds + row), tl.load(out_index + row), tl.load(choices + row)
    group = tl.arange(0, GROUPS)
    w0, w1, w2, w3 = random_words(seed, index, choice, first_group + group)
    place = (row * GROUPS + group) * 4
    tl.store(words + place, w0.to(tl.int64))
    tl.store(words + place + 1, w1.to(tl.int64))
    tl.store(words + place + 2, w2.to(tl.int64))
    tl.store(words + place + 3, w3.to(tl.int64))
    drawn = group_noise(seed, index, choice, first_group + group[:, None])
    tl.store(noise + place[:, None] + tl.arange(0, 4)[None, :], drawn)


@triton.jit
def gumbel_kernel(words, noise, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    tl.store(noise + i, gumbel(tl.load(words + i).to(tl.uint32)))


@triton.jit
def tile_noise_kernel(seeds, out_index, choices, noise, first_group, IDS: tl.constexpr, ROWS: tl.constexpr):
    m = tl.arange(0, ROWS)
    seed, index, choice = tl.load(seeds + m), tl.load(out_index + m), tl.load(choices + m)
    tile = tile_noise(seed, index, choice, first_group, IDS, ROWS)
    tl.store(noise + m[None, :] * IDS + tl.arange(0, IDS)[:, None], tile)


def draws(rows: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Seeds over all 64 bits, choices, output indexes."""
    seeds = torch.randint(-(2**63), 2**63 - 1, (rows,), dtype=torch.int64)
    choices = torch.randint(0, 5, (rows,), dtype=torch.int32)
    out_index = torch.randint(0, 2**20, (rows,), dtype=torch.int32)
    return seeds.to(device), choices.to(device), out_index.to(device)


def test_words_and_noise_are_the_references(device: torch.device) -> None:
    torch.manual_seed(1)
    rows, groups, first_group = 3, 16, 37_000
    seeds, choices, out_index = draws(rows, device)
    words = torch.full((rows, groups, 4), -1, dtype=torch.int64, device=device)
    noise = torch.full((rows, groups * 4), torch.nan, device=device)
    words_kernel[(rows,)](seeds, out_index, choices, words, noise, first_group, groups)
    key = (seeds[:, None] & 0xFFFFFFFF, (seeds[:, None] >> 32) & 0xFFFFFFFF)
    group = torch.arange(first_group, first_group + groups, device=device)[None].expand(rows, -1)
    counter = (out_index[:, None].long(), group, choices[:, None].long(), torch.zeros_like(group))
    assert torch.equal(words, torch.stack(reference.philox(counter, key), dim=-1))
    ids = torch.arange(4 * first_group, 4 * (first_group + groups), device=device)
    expected = reference.gumbel_noise(seeds, choices, out_index, ids)
    torch.testing.assert_close(noise, expected, rtol=1e-5, atol=1e-5)
    tile = torch.full((2, groups * 4), torch.nan, device=device)
    tile_noise_kernel[(1,)](seeds, out_index, choices, tile, first_group, groups * 4, 2)
    torch.testing.assert_close(tile, expected[:2], rtol=1e-5, atol=1e-5)


def test_noise_of_listed_ids_is_that_of_whole_rows(device: torch.device) -> None:
    torch.manual_seed(2)
    rows, groups, first_group = 3, 512, 25_000
    seeds, choices, out_index = draws(rows, device)
    words = torch.empty((rows, groups, 4), dtype=torch.int64, device=device)
    whole = torch.full((rows, groups * 4), torch.nan, device=device)
    words_kernel[(rows,)](seeds, out_index, choices, words, whole, first_group, groups)
    places = torch.stack([torch.randperm(groups * 4)[:1500] for _ in range(rows)]).to(device)
    listed = sampling.gumbel_noise(seeds, choices, out_index, places + 4 * first_group)
    assert torch.equal(listed, whole.gather(1, places))
    same = sampling.gumbel_noise(seeds, choices, out_index, places[0] + 4 * first_group)
    assert torch.equal(same, whole[:, places[0]])
    assert sampling.gumbel_noise(seeds, choices, out_index, places[:, :0]).shape == (rows, 0)


@pytest.mark.parametrize("vocab", [96, 3000])
def test_whole_rows_choose_what_the_reference_chooses(vocab: int, device: torch.device) -> None:
    torch.manual_seed(vocab)
    state, slots = slots_of([0.7, 1.3, 1.0, 0.9, 0.0, 1.1], device)
    state.top_k[:3] = torch.tensor([80, 0, 0], dtype=torch.int32)
    state.top_p[1:4] = torch.tensor([0.9, 0.5, 1.0])
    state.min_p[3] = 0.05
    values, ids = (torch.randn(6, vocab) * 2).to(device).sort(dim=-1, descending=True, stable=True)
    ids += 1002
    assert torch.equal(sampling.choose(values, ids, state, slots), reference.choose(values, ids, state, slots))


def test_noise_is_precise_over_its_whole_range(device: torch.device) -> None:
    words = torch.cat(
        [torch.arange(32), 2 ** torch.arange(5, 32), 2**32 - 2 ** torch.arange(0, 32), torch.arange(37) * 2**26]
    )
    words = words.long().to(device)
    assert len(words) == 128
    noise = torch.full((128,), torch.nan, device=device)
    gumbel_kernel[(1,)](words, noise, 128)
    uniform = ((words.float() + 0.5) * 2.0**-32).clamp(max=reference.LARGEST_UNIFORM).double()
    torch.testing.assert_close(noise.double(), -torch.log(-torch.log1p(-uniform)), rtol=1e-5, atol=1e-5)
    assert noise.isfinite().all()


def slots_of(temperature: list[float], device: torch.device) -> tuple[SlotTensors, torch.Tensor]:
    """Slots with these temperatures and random seeds, and rows that stand for them in another order."""
    size = len(temperature) + 1
    seeds, choices, out_index = draws(size, device)

    def zeros(kind: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.zeros(size, dtype=kind, device=device)

    state = SlotTensors(
        tables_SM=torch.zeros(size, 3, dtype=torch.int32, device=device),
        length=zeros(),
        last_token=zeros(),
        out_index=out_index,
        seed=seeds,
        choice=choices,
        top_k=zeros(),
        temperature=torch.tensor([*temperature, 0.0], device=device),
        top_p=zeros(torch.float32) + 1,
        min_p=zeros(torch.float32),
        turn=torch.ones(1, dtype=torch.int32, device=device),
        ring=torch.full((4, size), -7, dtype=torch.int32, pin_memory=device.type == "cuda"),
        stamps=torch.zeros(4, 2, dtype=torch.int64, pin_memory=device.type == "cuda"),
        history=torch.zeros(0, 0, dtype=torch.int32, device=device),
    )
    return state, torch.randperm(len(temperature)).int().to(device)


@pytest.mark.parametrize(("vocab", "first_id"), [(5000, 0), (4096, 18_992), (9000, 1002)])
def test_noisy_slices_hold_the_references_best(vocab: int, first_id: int, device: torch.device) -> None:
    torch.manual_seed(vocab)
    state, slots = slots_of([0.0, 0.7, 1.3, 0.9], device)
    state.top_k[2:4] = torch.tensor([20, 65], dtype=torch.int32)  # no noise for the first, noise for the second
    logits = (torch.randn(4, vocab) * 3).to(device)
    value, token = reference.best_slice(*sampling.noisy_slices(logits, state, slots, first_id))
    expected_value, expected = reference.best_slice(*reference.noisy_slices(logits, state, slots, first_id))
    assert torch.equal(token, expected)
    torch.testing.assert_close(value, expected_value, rtol=1e-5, atol=1e-5)


def test_the_lowest_of_equal_ids_wins_and_masked_rows_have_no_value(device: torch.device) -> None:
    state, _ = slots_of([0.0, 0.0], device)
    slots = torch.arange(2, dtype=torch.int32, device=device)
    logits = torch.full((2, 8200), -torch.inf, dtype=torch.bfloat16, device=device)
    logits[0, [300, 5000]] = 2
    value, token = reference.best_slice(*sampling.noisy_slices(logits, state, slots, 100))
    assert token.tolist() == [400, 100]
    assert value.tolist() == [2.0, -torch.inf]


def test_draws_follow_the_softmax(device: torch.device) -> None:
    rows, probabilities = 96, torch.tensor([0.5, 0.3, 0.15, 0.05])
    torch.manual_seed(3)
    state, slots = slots_of([1.0] * rows, device)
    logits = probabilities.log().expand(rows, 4).contiguous().to(device)
    _, token = reference.best_slice(*sampling.noisy_slices(logits, state, slots, 0))
    share = torch.bincount(token.cpu(), minlength=4) / rows
    assert (share - probabilities).abs().max() < 0.15


@pytest.mark.parametrize(("rows", "hidden"), [(1, 128), (1, 192), (2, 64), (20, 128)])
def test_fused_head_is_head_then_noisy_slices(rows: int, hidden: int, device: torch.device) -> None:
    torch.manual_seed(rows + hidden)
    vocab, first_id = 600, 1002
    h, norm = torch.randn(rows, hidden).to(device), torch.rand(hidden).to(device) + 0.5
    weight = torch.randn(vocab, hidden).to(device)
    state, slots = slots_of([i % 3 * 0.8 for i in range(rows)], device)
    plan = sampling.head_plan(rows, hidden)._replace(programs=3, ids=32)
    inputs = (h, norm, EPS, weight, state, slots, first_id, 590)
    value, token = reference.best_slice(*sampling.head_slices(*inputs, plan=plan))
    expected_value, expected = reference.best_slice(*reference.head_slices(*inputs))
    assert torch.equal(token, expected)
    torch.testing.assert_close(value, expected_value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 3])
def test_fused_head_shows_a_broken_row(rows: int, device: torch.device) -> None:
    h, norm, weight = torch.randn(rows, 64).to(device), torch.ones(64).to(device), torch.randn(200, 64).to(device)
    h[-1, 5] = torch.nan
    state, slots = slots_of([1.0] * rows, device)
    value, _ = reference.best_slice(*sampling.head_slices(h, norm, EPS, weight, state, slots, 0, 200))
    assert value.isfinite().tolist() == [True] * (rows - 1) + [False]


def test_many_rows_go_through_logits(device: torch.device) -> None:
    h, norm, weight = torch.randn(65, 64).to(device), torch.ones(64).to(device), torch.randn(80, 64).to(device)
    state, slots = slots_of([0.0] * 65, device)
    _, token = reference.best_slice(*sampling.head_slices(h, norm, EPS, weight, state, slots, 0, 80))
    assert torch.equal(token, reference.norm_linear(h, norm, EPS, weight).argmax(-1))


@pytest.mark.parametrize(("vocab", "count"), [(5000, 60), (40, 8), (5000, 70)])
def test_top_candidates_are_exact(vocab: int, count: int, device: torch.device) -> None:
    torch.manual_seed(vocab + count)
    logits = (torch.randn(1, vocab) * 4 - 9).to(torch.bfloat16).to(device)  # many ties, both signs among the best
    values, ids = sampling.top_candidates(logits, count)
    assert values.dtype == torch.float32 and ids.dtype == torch.int64
    assert torch.equal(values, torch.topk(logits, count).values.float())
    assert torch.equal(logits.gather(1, ids).float(), values)
    assert all(len(row.unique()) == count for row in ids)
    if vocab >= 64 and count <= 64:
        order = torch.argsort(logits.float(), dim=-1, descending=True, stable=True)
        assert torch.equal(ids, order[:, :count])
