"""Drafts and what is kept of them: the look-up against a naive one, kernels against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.device.test_stepping_kernels import BLOCK, assert_equal, on_cpu, random_state
from tpqwen.kernels import draft_reference, drafting
from tpqwen.kernels.context import SlotTensors
from tpqwen.kernels.draft_reference import LONGEST_MATCH, SKIPPED, find_draft

POSITIONS = 60  # of a slot: lengths are below 20, and two passes add up to 16 each
DRAWN = ("out_index", "seed", "choice", "top_k", "temperature", "top_p", "min_p")


def naive_draft(tokens: list[int], count: int) -> list[int]:
    """Word for word what find_draft promises."""

    def matched(place: int) -> int:
        """How many of the last tokens stand right before the place."""
        n = 0
        while n < min(LONGEST_MATCH, place) and tokens[place - 1 - n] == tokens[-1 - n]:
            n += 1
        return n

    places = range(1, len(tokens))
    place = max(places, key=lambda p: (matched(p), p), default=0)
    grown = list(tokens)
    while len(grown) < len(tokens) + count:
        grown.append(grown[place + len(grown) - len(tokens)])
    return grown[len(tokens) :]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 15))
def test_a_draft_is_what_followed_the_latest_and_longest_match(tokens: list[int], count: int) -> None:
    assert find_draft(torch.tensor(tokens), count).tolist() == naive_draft(tokens, count)


def test_examples_of_drafts() -> None:
    def draft(text: str, count: int = 5) -> str:
        return "".join(map(chr, find_draft(torch.tensor([ord(c) for c in text]), count).tolist()))

    assert draft("the cat sat. Copy: the c") == "at sa"
    assert draft("xabcy, zbcw, abc", 2) == "y,", "three tokens count for more than two that came later"
    assert draft("xbcy, zbcw, abc", 2) == "w,", "and the latest of equals for most"
    assert draft("0 1 0 1 0") == " 1 0 ", "a loop goes on"
    assert draft("abcd") == "ddddd"
    assert draft("a") == "aaaaa"


def drafting_state(size: int, device: torch.device) -> SlotTensors:
    """Slots whose tokens repeat themselves now and then."""
    state = random_state(size, device, POSITIONS)
    table = torch.arange(size * 15, dtype=torch.int32).view(size, 15)
    history = torch.randint(0, 3, (size, POSITIONS), dtype=torch.int32)
    history[torch.arange(size), state.length.cpu().long()] = state.last_token.cpu()
    history[::2, :] %= 2
    last = history[torch.arange(size), state.length.cpu().long()]
    for name, value in (("tables_SM", table), ("history", history), ("last_token", last)):
        state = _with(state, name, value.to(device))
    return _with(state, "ring", torch.full((3, size * 16), -7, dtype=torch.int32, pin_memory=device.type == "cuda"))


def _with(state: SlotTensors, name: str, value: torch.Tensor) -> SlotTensors:
    fields: dict[str, Any] = {**vars(state), name: value}
    return SlotTensors(**fields)


@pytest.mark.parametrize("count", [1, 4, 7, 15])
def test_the_kernels_ends_of_a_pass_are_the_references(count: int, device: torch.device) -> None:
    state = drafting_state(40, device)
    theirs = on_cpu(state)
    slots = torch.randperm(39)[:16].int()
    slots[[2, 15]] = state.padding_slot
    real = slots != state.padding_slot
    for _ in range(2):
        expected = draft_reference.begin_drafts(theirs, slots, BLOCK, count)
        ours = drafting.begin_drafts(state, slots.to(device), BLOCK, count)
        for name in ("positions", "cache_slots", "lengths_B", "slots"):
            assert torch.equal(getattr(ours, name).cpu(), getattr(expected, name)), name
        ids, theirs_ids = (x.view(16, -1) for x in (ours.ids.cpu(), expected.ids))
        assert torch.equal(ids[real], theirs_ids[real])
        for name in DRAWN:
            a, b = getattr(ours.rows, name).cpu(), getattr(expected.rows, name)
            assert a.dtype == b.dtype and torch.equal(a.view(16, -1)[real], b.view(16, -1)[real]), name
        assert ours.rows.padding_slot == len(ours.slots), "no token is taken for padding"
        assert_equal(state, theirs)
        tokens = torch.where(torch.rand(ids.shape) < 0.8, torch.roll(ids, -1, 1), torch.randint(0, 9, ids.shape)).int()
        tokens[3, count // 2] = -1
        tokens[4] = torch.roll(ids[4], -1)
        tokens = tokens.flatten()
        draft_reference.accept_drafts(theirs, slots, ids.flatten(), tokens)
        drafting.accept_drafts(state, slots.to(device), ours.ids, tokens.to(device))
        assert_equal(state, theirs)


def test_a_row_keeps_what_was_right_and_one_token_more(device: torch.device) -> None:
    state = drafting_state(9, device)
    slots = torch.tensor([0, 1, 2, 3, 4], dtype=torch.int32, device=device)
    before = on_cpu(state)
    drafts = drafting.begin_drafts(state, slots, BLOCK, 3)
    given = drafts.ids.view(5, 4)
    given[:, 1:] = torch.tensor([11, 12, 13], dtype=torch.int32)
    tokens = torch.tensor(
        [[11, 12, 13, 14], [11, 12, 15, 14], [9, 12, 13, 14], [11, -1, 13, 14], [-1, 12, 13, 14]], dtype=torch.int32
    )
    drafting.accept_drafts(state, slots, drafts.ids, tokens.flatten().to(device))
    kept = [[11, 12, 13, 14], [11, 12, 15], [9], [11, -1], [-1]]
    ring = state.ring[5 % 3, :20].view(5, 4).tolist()
    for row, expected in enumerate(kept):
        count, start = len(expected), int(before.length[row])
        assert ring[row] == expected + [SKIPPED] * (4 - count)
        assert int(state.length[row]) == start + count
        assert int(state.out_index[row]) == int(before.out_index[row]) + count
        good = [max(0, token) for token in expected]
        assert int(state.last_token[row]) == good[-1]
        line = state.history[row].tolist()
        assert line[start + 1 :][:count] == good and line[: start + 1] == before.history[row, : start + 1].tolist()
        assert line[start + 1 + count :] == before.history[row, start + 1 + count :].tolist()


def test_long_histories_are_searched_to_their_beginning(device: torch.device) -> None:
    state = drafting_state(3, device)
    length = 3 * drafting.AT_ONCE + 77
    history = torch.arange(3 * (length + 9), dtype=torch.int32).view(3, -1)
    history[0, length - 2 : length + 1] = history[0, 0:3]
    history[1, length - 2 : length + 1] = history[1, drafting.AT_ONCE - 1 :][:3]
    state = _with(state, "history", history.to(device))
    state = _with(state, "tables_SM", torch.zeros(3, length, dtype=torch.int32, device=device))
    state.length[:2] = length
    state.last_token[:2] = state.history[:2, length]
    ids = drafting.begin_drafts(state, torch.tensor([0, 1], dtype=torch.int32, device=device), BLOCK, 4).ids.view(2, 5)
    assert ids[0, 1:].tolist() == history[0, 3:7].tolist()
    assert ids[1, 1:].tolist() == history[1, drafting.AT_ONCE + 2 :][:4].tolist()
