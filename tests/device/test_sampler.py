"""Sampling: the distribution, the independence from the path taken, edits, and shards that agree with the whole."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest
import torch

from tests.ranks_in_threads import Meeting, ThreadGroup
from tpqwen.parallel.group import TPGroup
from tpqwen.step import Admit, RowParams
from tpqwen.worker.sampler import LogitEdits, SampleKind, Sampler, kind_of
from tpqwen.worker.slots import ADMIT_INTS, SlotState, admit_row

VOCAB = 96
EVERYTHING = SampleKind(candidates=True, full=True)


def state_of(params: list[RowParams], out_index: torch.Tensor | None = None) -> SlotState:
    """Slots 0.. hold the given parameters; a pass has begun."""
    state = SlotState(len(params), 4, torch.device("cpu"))
    index = [0] * len(params) if out_index is None else out_index.tolist()
    admits = tuple(Admit(i, p, index[i], 0) for i, p in enumerate(params))
    rows = torch.tensor([admit_row(a) for a in admits], dtype=torch.int32).reshape(-1, ADMIT_INTS)
    state.admit(rows)
    state.params.update((a.slot, a.params) for a in admits)
    state.tensors.turn.add_(1)
    return state


def every_slot(state: SlotState) -> torch.Tensor:
    return torch.arange(state.tensors.padding_slot, dtype=torch.int32)


def sample(logits: torch.Tensor, params: list[RowParams], out_index: torch.Tensor, kind: SampleKind) -> torch.Tensor:
    state = state_of(params, out_index)
    tokens = Sampler(TPGroup.single(), state.tensors, 0).sample(logits, every_slot(state), kind)
    assert (tokens >= 0).all()
    assert torch.equal(state.tensors.last_token[:-1], tokens)
    assert torch.equal(state.tensors.ring[0, : len(tokens)], tokens)
    assert torch.equal(state.tensors.out_index[:-1], out_index + 1)
    return tokens


def allowed_distribution(logits: torch.Tensor, p: RowParams) -> torch.Tensor:
    """The textbook: temperature, top-k, top-p over what is left, min-p, renormalised."""
    probs = torch.softmax(logits.double() / p.temperature, -1)
    order = torch.argsort(probs, descending=True)
    keep = torch.ones_like(probs, dtype=torch.bool)
    if p.top_k:
        keep[order[p.top_k :]] = False
    probs = torch.where(keep, probs, 0)
    probs /= probs.sum()
    mass = 0.0
    for token in order.tolist():
        if mass >= p.top_p:
            keep[token] = False
        mass += probs[token].item()
    keep &= probs >= p.min_p * probs.max()
    probs = torch.where(keep, probs, 0)
    return probs / probs.sum()


@pytest.mark.parametrize(
    "p",
    [
        RowParams(1.0, 0, 1.0, 0.0, 0, 0),
        RowParams(0.7, 12, 1.0, 0.0, 0, 0),
        RowParams(0.6, 20, 0.9, 0.0, 0, 0),
        RowParams(1.3, 0, 0.8, 0.0, 0, 0),
        RowParams(1.0, 0, 1.0, 0.1, 0, 0),
        RowParams(1.0, 40, 0.95, 0.05, 0, 0),
    ],
)
def test_samples_follow_the_exact_distribution(p: RowParams) -> None:
    """Chi-square of 20,000 draws; the seeds are fixed, so the test is deterministic."""
    draws = 20000
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(5)) * 2
    params = [msgspec.structs.replace(p, seed=seed) for seed in range(draws)]
    tokens = sample(logits.expand(draws, -1), params, torch.zeros(draws, dtype=torch.int32), kind_of([p]))
    expected = allowed_distribution(logits, p) * draws
    counts = torch.bincount(tokens.long(), minlength=VOCAB).double()
    assert counts[expected == 0].sum() == 0, "a forbidden token was drawn"
    large = expected >= 5
    chi2 = ((counts - expected) ** 2 / expected)[large].sum().item()
    freedom = int(large.sum()) - 1
    assert chi2 < freedom + 5 * math.sqrt(2 * freedom), (chi2, freedom)


def test_the_path_taken_never_changes_the_token() -> None:
    params = [RowParams(0.8, k, p, m, 11 * k + 1, 0) for k in (0, 5, 64, 70) for p in (1.0, 0.9) for m in (0.0, 0.05)]
    params.append(RowParams(0.0, 20, 0.9, 0.0, 3, 0))
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(len(params), VOCAB, generator=generator) * 3
    index = torch.arange(len(params), dtype=torch.int32)
    together = sample(logits, params, index, EVERYTHING)
    for i, p in enumerate(params):
        alone = sample(logits[i : i + 1], [p], index[i : i + 1], kind_of([p]))
        assert alone.item() == together[i].item(), p
    assert together[-1] == logits[-1].argmax()


def test_kinds_add_up() -> None:
    small, whole = RowParams(0.8, 5, 1.0, 0.0, 1, 0), RowParams(0.8, 0, 0.9, 0.0, 1, 0, logprobs=2)
    assert kind_of([small]) | kind_of([whole]) == kind_of([small, whole])
    assert kind_of([small]) | SampleKind() == kind_of([small])


def test_noise_depends_on_seed_choice_and_index_only() -> None:
    logits = torch.zeros(1, VOCAB)

    def draw(seed: int, choice: int, index: int) -> int:
        p = RowParams(1.0, 0, 1.0, 0.0, seed, choice)
        return int(sample(logits, [p], torch.tensor([index], dtype=torch.int32), kind_of([p])))

    assert draw(7, 0, 3) == draw(7, 0, 3)
    assert len({draw(s, c, i) for s in (7, 2**63 + 7) for c in (0, 1) for i in (0, 1)}) > 4


@pytest.mark.parametrize("size", [2, 4])
def test_shards_choose_what_the_whole_vocabulary_chooses(size: int) -> None:
    params = [RowParams(0.9, k, p, m, k, 0) for k in (0, 20, 70) for p in (1.0, 0.8) for m in (0.0, 0.1)]
    params += [RowParams(0.0, 0, 1.0, 0.0, 0, 0)] * 2
    logits = torch.randn(len(params), VOCAB, generator=torch.Generator().manual_seed(9)) * 3
    index = torch.arange(len(params), dtype=torch.int32)
    whole = sample(logits, params, index, EVERYTHING)
    full = Sampler(TPGroup.single(), state_of(params).tensors, 0).logprobs(logits, whole, 5)
    meeting, width = Meeting(size), VOCAB // size

    def rank(r: int) -> tuple[torch.Tensor, list[object]]:
        state = state_of(params, index)
        sampler = Sampler(ThreadGroup(r, size, meeting), state.tensors, r * width)
        shard = logits[:, r * width : (r + 1) * width].contiguous()
        tokens = sampler.sample(shard, every_slot(state), EVERYTHING)
        part = sampler.logprobs(shard, tokens, 5)
        return tokens, [part.chosen, part.top[:, :5], part.top_ids[:, :5]]

    with ThreadPoolExecutor(size) as pool:
        for tokens, (chosen, top, ids) in pool.map(rank, range(size)):
            assert torch.equal(tokens, whole)
            assert torch.allclose(chosen, full.chosen, atol=1e-5)
            assert torch.allclose(top, full.top, atol=1e-5)
            assert torch.equal(ids, full.top_ids)


def test_a_bad_row_is_reported_and_its_neighbours_are_untouched() -> None:
    params = [RowParams(1.0, 0, 1.0, 0.0, s, 0) for s in range(3)]
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(2))
    index = torch.zeros(3, dtype=torch.int32)
    clean = sample(logits, params, index, SampleKind())
    logits[1, 40] = float("nan")
    state = state_of(params, index)
    tokens = Sampler(TPGroup.single(), state.tensors, 0).sample(logits, every_slot(state), SampleKind())
    assert tokens[1] == -1
    assert state.tensors.last_token[1] == 0
    assert tokens[0] == clean[0]
    assert tokens[2] == clean[2]


def test_penalties_bias_and_min_tokens_edit_the_logits() -> None:
    p = RowParams(
        0.0, 0, 1.0, 0.0, 0, 0, 0.5, 0.25, 1.5, logit_bias=((9, -3.0),), min_tokens=2, end_ids=(4,), logprobs=0
    )
    plain = RowParams(0.0, 0, 1.0, 0.0, 0, 0)
    state = state_of([p, plain])
    rows = state.gather(every_slot(state))
    edits = LogitEdits(2, 0, VOCAB, torch.device("cpu"))
    edits.admit(0, torch.tensor([1, 2, 2, 3, 3, 3], dtype=torch.int32), num_prompt=3)  # prompt 1 2 2, output 3 3 3
    edits.count(torch.tensor([0, 1]), torch.tensor([5, 5]))
    logits = torch.linspace(-1, 1, VOCAB).repeat(2, 1)
    slots = torch.arange(2)
    edited = edits.apply(logits, slots, rows, torch.tensor([1, 1], dtype=torch.int32), [p, plain])
    expected = logits.clone()
    for token in (1, 2, 3, 5):
        value = expected[0, token]
        expected[0, token] = value / 1.5 if value > 0 else value * 1.5
    expected[0, 3] -= 0.25 * 3 + 0.5
    expected[0, 5] -= 0.25 + 0.5
    expected[0, 9] -= 3.0
    expected[0, 4] = float("-inf")
    assert torch.allclose(edited, expected)
    later = edits.apply(logits, slots, rows, torch.tensor([2, 2], dtype=torch.int32), [p, plain])
    assert later[0, 4] == logits[0, 4]
    assert state.params[0] is p
