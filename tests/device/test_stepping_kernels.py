"""Both ends of a pass, begin_step and finish_step, and the edits between passes: kernels against the reference."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from tpqwen.kernels import reference, stepping
from tpqwen.kernels.context import SlotTensors

BLOCK = 4


def random_state(size: int, device: torch.device, positions: int = 0) -> SlotTensors:
    """Slots in mid sequence, the last of them the padding slot. positions: of the tokens that are kept of each."""
    torch.manual_seed(size)

    def ints(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape or (size,), dtype=torch.int32).to(device)

    length = ints(20)
    length[-1] = 0
    return SlotTensors(
        tables_SM=ints(50, size, 6),
        length=length,
        last_token=ints(99),
        out_index=ints(9),
        seed=torch.randint(0, 2**62, (size,)).to(device),
        choice=ints(3),
        top_k=ints(12),
        temperature=(torch.rand(size) * 2).to(device) * (ints(4) > 0),
        top_p=(torch.rand(size) * 0.6 + 0.4).to(device),
        min_p=(torch.rand(size) * 0.1).to(device),
        turn=torch.tensor([5], dtype=torch.int32, device=device),
        ring=torch.full((3, size), -7, dtype=torch.int32, pin_memory=device.type == "cuda"),
        stamps=torch.zeros(3, 2, dtype=torch.int64, pin_memory=device.type == "cuda"),
        history=torch.zeros(size, positions, dtype=torch.int32, device=device),
    )


def on_cpu(state: SlotTensors) -> SlotTensors:
    """A copy for the reference."""
    return SlotTensors(**{f.name: getattr(state, f.name).cpu().clone() for f in fields(SlotTensors)})


def assert_equal(ours: SlotTensors, theirs: SlotTensors) -> None:
    """All but the padding slot, whose state means nothing besides its length, and the time, which a CPU leaves out."""
    for f in fields(SlotTensors):
        if f.name == "stamps":
            continue
        a, b = getattr(ours, f.name).cpu(), getattr(theirs, f.name)
        if f.name in ("last_token", "out_index", "history"):
            a, b = a[:-1], b[:-1]
        assert torch.equal(a, b), f.name


def test_begin_step_is_the_references(device: torch.device) -> None:
    state = random_state(200, device)
    theirs = on_cpu(state)
    slots = torch.randperm(199)[:150].int()
    slots[[3, 149]] = state.padding_slot
    slots = slots.to(device)
    for _ in range(3):
        ours, expected = stepping.begin_step(state, slots, BLOCK), reference.begin_step(theirs, slots.cpu(), BLOCK)
        for a, b in zip(ours, expected, strict=True):
            assert torch.equal(a.cpu(), b)
        assert_equal(state, theirs)
    stepping.begin_step(state, slots[:0], BLOCK)
    assert int(state.turn) == 9


@pytest.mark.parametrize("slices", [1, 40, 1100])
@pytest.mark.parametrize("count", [0, 9, 64])
@pytest.mark.parametrize("positions", [0, 24])
def test_finish_step_is_the_references(slices: int, count: int, positions: int, device: torch.device) -> None:
    state = random_state(24, device, positions)
    theirs = on_cpu(state)
    slots = torch.randperm(23)[:20].int()
    slots[7] = state.padding_slot
    value = torch.randn(20, slices)
    ids = torch.randint(0, 900, (20, slices), dtype=torch.int32)
    value[1] = torch.inf
    value[2, 0] = torch.nan
    value[3] = -torch.inf
    value[4] = 1.0
    candidates = None
    if count:
        values = (torch.randn(20, count) * 3).sort(-1, descending=True).values
        candidates = (values, torch.stack([torch.randperm(900)[:count] for _ in range(20)]))
    moved = (x.to(device) for x in (slots, value, ids))
    given = (candidates[0].to(device), candidates[1].to(device)) if candidates else None
    tokens = stepping.finish_step(state, *moved, given).cpu()
    expected = reference.finish_step(theirs, slots, value, ids, candidates)
    real = slots != state.padding_slot
    assert torch.equal(tokens[real], expected[real])
    assert tokens[1:4].tolist() == [-1, -1, -1]
    state.ring[:, 7] = theirs.ring[:, 7]
    assert_equal(state, theirs)


def test_the_ring_goes_on_when_the_count_of_passes_wraps(device: torch.device) -> None:
    state = random_state(24, device)
    slots, value, ids = torch.arange(20).int(), torch.randn(20, 4), torch.randint(0, 900, (20, 4), dtype=torch.int32)
    for turn in (2**31 - 1, -(2**31) + 1, -(2**31) + 2, -(2**31) + 3, -5, 0):
        state.turn.fill_(turn)
        state.ring.fill_(-7)
        theirs = on_cpu(state)
        stepping.finish_step(state, slots.to(device), value.to(device), ids.to(device), None).cpu()
        reference.finish_step(theirs, slots, value, ids, None)
        assert_equal(state, theirs)


def test_edits_set_table_entries_and_rows_are_padded(device: torch.device) -> None:
    state = random_state(10, device)
    expected = state.tables_SM.clone()
    edits = torch.tensor([(s, i, 100 * s + i) for s in range(9) for i in (0, 3, 5)], dtype=torch.int32)
    edits = edits.pin_memory() if device.type == "cuda" else edits
    reference.edit_slots(expected, edits.to(device))
    stepping.edit_slots(state.tables_SM, edits)
    assert torch.equal(state.tables_SM, expected)
    rows = torch.full((300,), -5, dtype=torch.int32, device=device)
    slots = torch.tensor([4, 1, 7], dtype=torch.int32)
    stepping.set_rows(rows, slots.pin_memory() if device.type == "cuda" else slots, 9)
    assert rows.tolist() == [4, 1, 7] + [9] * 297
    stepping.set_rows(rows, slots[:0], 8)
    assert rows.tolist() == [8] * 300


def test_a_gpu_stamps_the_time_of_a_pass_and_the_interpreter_has_none(device: torch.device) -> None:
    state = random_state(24, device)
    slots = torch.arange(20).int().to(device)
    value, ids = torch.randn(20, 4).to(device), torch.randint(0, 900, (20, 4), dtype=torch.int32).to(device)
    for _ in range(4):  # passes 5 to 8 in a ring of three
        stepping.begin_step(state, slots, BLOCK)
        stepping.finish_step(state, slots, value, ids, None).cpu()
    stamps = [state.stamps[turn % 3].tolist() for turn in (6, 7, 8)]
    times = [time for pair in stamps for time in pair]
    if device.type == "cuda":
        assert times[0] > 0 and times == sorted(times) and times[-1] - times[0] < 1e9
    else:
        assert times == [0] * 6
