"""The two ends of a speculative pass on the device: drafts from a slot's own tokens, and how many of them were right.

B rows, T tokens of a row, L tokens of history. kernels/draft_reference.py says what a draft is and when it is kept. A
slot advances by as many tokens as were kept before the host knows how many, so the next step can be launched behind.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tpqwen.kernels.context import DraftInputs, SlotTensors
from tpqwen.kernels.draft_reference import LONGEST_MATCH, SKIPPED, scratch_rows
from tpqwen.kernels.launch import launch_options, release_next, stamps_time, wait_previous
from tpqwen.kernels.stepping import begin_pass, place_in_ring, stamp

AT_ONCE = 2048  # tokens of history that a program compares in one go
NONE = tl.constexpr(SKIPPED)
assert LONGEST_MATCH == 3, "the kernel compares three tokens"


@triton.jit
def _find(line, last, AT_ONCE: tl.constexpr, WIDTH: tl.constexpr):
    """draft_reference.find_draft's place among positions 1 .. last of a slot's history, whose newest token is last."""
    newest = tl.load(line + last)
    second = tl.load(line + last - 1, mask=last >= 1, other=-1)
    third = tl.load(line + last - 2, mask=last >= 2, other=-1)
    best = tl.minimum(last, 1)
    for start in range(1, last + 1, AT_ONCE):
        place = start + tl.arange(0, AT_ONCE)
        inside = place <= last
        one = inside & (tl.load(line + place - 1, mask=inside, other=-2) == newest)
        two = one & (tl.load(line + place - 2, mask=inside & (place >= 2), other=-2) == second)
        three = two & (tl.load(line + place - 3, mask=inside & (place >= 3), other=-2) == third)
        matched = one.to(tl.int32) + two.to(tl.int32) + three.to(tl.int32)
        best = tl.maximum(best, tl.max(tl.where(inside, matched * WIDTH + place, 0), axis=0))
    return best % WIDTH


@triton.jit(do_not_specialize=["padding"])
def _begin_kernel(
    slots,
    tables,
    length,
    history,
    last_token,
    out_index,
    seeds,
    choices,
    top_k,
    temperature,
    top_p,
    min_p,
    turn,
    stamps,
    ids,
    positions,
    cache_slots,
    lengths,
    order,
    row_index,
    row_seed,
    row_choice,
    row_top_k,
    row_temperature,
    row_top_p,
    row_min_p,
    padding,
    table_stride,
    P: tl.constexpr,
    T: tl.constexpr,
    LANES: tl.constexpr,
    AT_ONCE: tl.constexpr,
    WIDTH: tl.constexpr,
    RING: tl.constexpr,
    STAMP: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row."""
    release_next(PDL)
    row = tl.program_id(0)
    lane = tl.arange(0, LANES)
    inside = lane < T
    at = row * T + lane
    wait_previous(PDL)
    slot = tl.load(slots + row)
    active = slot != padding
    last = tl.load(length + slot)
    line = history + slot.to(tl.int64) * WIDTH
    place = _find(line, last, AT_ONCE, WIDTH)
    period = last + 1 - place
    drafted = tl.load(line + place + (lane + period - 1) % period, mask=inside & (lane > 0), other=0)
    tl.store(ids + at, tl.where(lane == 0, tl.load(last_token + slot), drafted), mask=inside)
    position = tl.where(active, last + lane, 0)
    tl.store(positions + at, position, mask=inside)
    block = tl.load(tables + slot.to(tl.int64) * table_stride + position // P, mask=inside, other=0).to(tl.int64)
    tl.store(cache_slots + at, tl.where(active, block * P + position % P, -1), mask=inside)
    tl.store(lengths + row, tl.where(active, last + T, T))
    tl.store(order + at, at, mask=inside)
    tl.store(row_index + at, tl.load(out_index + slot) + lane, mask=inside)
    everywhere = lane * 0
    tl.store(row_seed + at, tl.load(seeds + slot) + everywhere, mask=inside)
    tl.store(row_choice + at, tl.load(choices + slot) + everywhere, mask=inside)
    tl.store(row_top_k + at, tl.load(top_k + slot) + everywhere, mask=inside)
    tl.store(row_temperature + at, tl.load(temperature + slot) + everywhere, mask=inside)
    tl.store(row_top_p + at, tl.load(top_p + slot) + everywhere, mask=inside)
    tl.store(row_min_p + at, tl.load(min_p + slot) + everywhere, mask=inside)
    if row == 0:
        begin_pass(turn, stamps, RING, STAMP)


def begin_drafts(state: SlotTensors, slots_B: torch.Tensor, block_size: int, count: int) -> DraftInputs:
    """draft_reference.begin_drafts in one launch."""
    num_rows, width, device = len(slots_B), count + 1, slots_B.device
    total = num_rows * width
    ids, positions, order = (torch.empty(total, dtype=torch.int32, device=device) for _ in range(3))
    cache_slots = torch.empty(total, dtype=torch.int64, device=device)
    lengths = torch.empty(num_rows, dtype=torch.int32, device=device)
    rows = scratch_rows(state, total)
    assert state.history.is_contiguous() and num_rows > 0
    _begin_kernel[(num_rows,)](
        slots_B,
        state.tables_SM,
        state.length,
        state.history,
        state.last_token,
        *(getattr(state, name) for name in _DRAWN),
        state.turn,
        state.stamps,
        ids,
        positions,
        cache_slots,
        lengths,
        order,
        *(getattr(rows, name) for name in _DRAWN),
        state.padding_slot,
        state.tables_SM.stride(0),
        block_size,
        width,
        triton.next_power_of_2(width),
        min(AT_ONCE, triton.next_power_of_2(state.history.shape[1])),
        state.history.shape[1],
        len(state.stamps),
        stamps_time(device),
        num_warps=4,
        **launch_options(device),
    )
    return DraftInputs(ids, positions, cache_slots, lengths, order, rows)


_DRAWN = ("out_index", "seed", "choice", "top_k", "temperature", "top_p", "min_p")  # what a token is sampled with


@triton.jit(do_not_specialize=["padding"])
def _accept_kernel(
    slots,
    ids,
    tokens,
    length,
    history,
    last_token,
    out_index,
    turn,
    ring,
    stamps,
    padding,
    T: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    RING: tl.constexpr,
    RING_WIDTH: tl.constexpr,
    STAMP: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row."""
    release_next(PDL)
    row = tl.program_id(0)
    lane = tl.arange(0, LANES)
    inside = lane < T
    wait_previous(PDL)
    slot = tl.load(slots + row)
    token = tl.load(tokens + row * T + lane, mask=inside, other=-1)
    drafted = tl.load(ids + row * T + lane + 1, mask=lane < T - 1, other=NONE)
    count = tl.min(tl.where((token == drafted) & (lane < T - 1), LANES, lane), axis=0) + 1
    kept = lane < count
    at = place_in_ring(tl.load(turn) - 1, RING)
    tl.store(ring + at * RING_WIDTH + row * T + lane, tl.where(kept, token, NONE), mask=inside)
    if slot != padding:
        token = tl.maximum(token, 0)
        before = tl.load(length + slot)
        index = tl.load(out_index + slot)
        place = before + 1 + lane
        tl.store(history + slot.to(tl.int64) * WIDTH + place, token, mask=kept & (place < WIDTH))
        tl.store(last_token + slot, tl.sum(tl.where(lane == count - 1, token, 0), axis=0))
        tl.store(length + slot, before + count)
        tl.store(out_index + slot, index + count)
    if row == tl.num_programs(0) - 1:
        stamp(stamps + at * 2 + 1, STAMP)


def accept_drafts(state: SlotTensors, slots_B: torch.Tensor, ids: torch.Tensor, tokens: torch.Tensor) -> None:
    """draft_reference.accept_drafts in one launch."""
    num_rows = len(slots_B)
    assert len(ids) == len(tokens) <= state.ring.shape[1] and len(ids) % num_rows == 0
    width = len(ids) // num_rows
    _accept_kernel[(num_rows,)](
        slots_B,
        ids,
        tokens,
        state.length,
        state.history,
        state.last_token,
        state.out_index,
        state.turn,
        state.ring,
        state.stamps,
        state.padding_slot,
        width,
        triton.next_power_of_2(width),
        state.history.shape[1],
        len(state.ring),
        state.ring.stride(0),
        stamps_time(slots_B.device),
        num_warps=1,
        **launch_options(slots_B.device),
    )
