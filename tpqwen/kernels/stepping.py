"""The two ends of a pass on the device: decode inputs from the slots' state, and the sampled tokens back into it.

B decode rows, R sampled rows, S slices of the vocabulary, C candidates, E edits, M table width. A steady decode step is
one CUDA graph that begins with begin_step and ends with finish_step, so the host sends it nothing and copies nothing.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

from tpqwen.kernels.context import DecodeInputs, SlotTensors
from tpqwen.kernels.launch import launch_options, release_next, stamps_time, wait_previous
from tpqwen.kernels.noise import id_noise
from tpqwen.kernels.sampling import COLDEST, FEW, NO_ID

BEGIN_ROWS = 128  # rows of one program
EDITS = 256
MAX_WIDTH = 1024  # slices that finish_step looks at in one go


@triton.jit
def place_in_ring(turn, RING: tl.constexpr):
    """Of the turn-th pass in the ring; the count of passes may have wrapped, and below 0 % is C's."""
    return (turn % RING + RING) % RING


@triton.jit
def stamp(where, STAMP: tl.constexpr):
    """The device's time into a place of `stamps`, where kernels can read it."""
    if STAMP:
        tl.store(where, globaltimer())


@triton.jit
def begin_pass(turn, stamps, RING: tl.constexpr, STAMP: tl.constexpr):
    """Count a pass and stamp its begin: for one program of its first kernel."""
    count = tl.load(turn)
    stamp(stamps + place_in_ring(count, RING) * 2, STAMP)
    tl.store(turn, count + 1)


@triton.jit(do_not_specialize=["B", "padding"])
def _begin_kernel(
    slots,
    tables,
    length,
    last_token,
    turn,
    stamps,
    ids,
    positions,
    cache_slots,
    lengths,
    B,
    padding,
    table_stride,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    RING: tl.constexpr,
    STAMP: tl.constexpr,
    PDL: tl.constexpr,
):
    release_next(PDL)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < B
    wait_previous(PDL)
    slot = tl.load(slots + row, mask=inside, other=0)
    active = inside & (slot != padding)
    position = tl.load(length + slot, mask=active, other=0)
    block = tl.load(tables + slot.to(tl.int64) * table_stride + position // P, mask=active, other=0).to(tl.int64)
    tl.store(ids + row, tl.load(last_token + slot, mask=active, other=0), mask=inside)
    tl.store(positions + row, position, mask=inside)
    tl.store(cache_slots + row, tl.where(active, block * P + position % P, -1), mask=inside)
    after = tl.where(active, position + 1, 0)
    tl.store(lengths + row, after, mask=inside)
    tl.store(length + slot, after, mask=active)
    if tl.program_id(0) == 0:
        begin_pass(turn, stamps, RING, STAMP)


def begin_step(state: SlotTensors, slots_B: torch.Tensor, block_size: int) -> DecodeInputs:
    """reference.begin_step in one launch."""
    rows, device = len(slots_B), slots_B.device
    ids, positions, lengths = (torch.empty(rows, dtype=torch.int32, device=device) for _ in range(3))
    cache_slots = torch.empty(rows, dtype=torch.int64, device=device)
    _begin_kernel[(max(1, triton.cdiv(rows, BEGIN_ROWS)),)](
        slots_B,
        state.tables_SM,
        state.length,
        state.last_token,
        state.turn,
        state.stamps,
        ids,
        positions,
        cache_slots,
        lengths,
        rows,
        state.padding_slot,
        state.tables_SM.stride(0),
        block_size,
        BEGIN_ROWS,
        len(state.stamps),
        stamps_time(device),
        num_warps=4,
        **launch_options(device),
    )
    return DecodeInputs(ids, positions, cache_slots, lengths)


@triton.jit
def _best(value, ids, row, S, WIDTH: tl.constexpr):
    """Best value and its lowest id of a row's S slices. NaN counts as +inf."""
    s = tl.arange(0, WIDTH)
    top = tl.full([WIDTH], float("-inf"), tl.float32)
    top_id = tl.full([WIDTH], NO_ID, tl.int32).to(tl.int64)
    for start in range(0, S, WIDTH):
        inside = start + s < S
        other = tl.load(value + row * S + start + s, mask=inside, other=float("-inf"))
        other = tl.where(other == other, other, float("inf"))
        other_id = tl.load(ids + row * S + start + s, mask=inside, other=NO_ID).to(tl.int64)
        better = (other > top) | ((other == top) & (other_id < top_id))
        top = tl.where(better, other, top)
        top_id = tl.where(better, other_id, top_id)
    best = tl.max(top, axis=0)
    return best, tl.min(tl.where(top == best, top_id, NO_ID), axis=0)


@triton.jit
def _chosen(values, ids, heat, top_k, top_p, min_p, seed, choice, index, C, WIDTH: tl.constexpr):
    """reference.choose for one row of C candidates, best first."""
    c = tl.arange(0, WIDTH)
    inside = c < C
    token = tl.load(ids + c, mask=inside, other=0)
    scaled = tl.load(values + c, mask=inside, other=float("-inf")).to(tl.float32) / heat
    scaled = tl.where(c < top_k, scaled, float("-inf"))
    mass = tl.exp(scaled - tl.max(scaled, axis=0))
    probability = mass / tl.sum(mass, axis=0)
    before = tl.cumsum(probability, axis=0) - probability
    highest = tl.max(probability, axis=0)
    keep = ((before < top_p) & (probability >= min_p * highest)) | (c == 0)
    noisy = tl.where(keep & inside, scaled + id_noise(seed, index, choice, token), float("-inf"))
    place = tl.min(tl.where(noisy == tl.max(noisy, axis=0), c, WIDTH), axis=0)
    return tl.sum(tl.where(c == place, token, 0), axis=0)


@triton.jit(do_not_specialize=["S", "C", "padding"])
def _finish_kernel(
    slots,
    value,
    ids,
    candidates,
    candidate_ids,
    temperature,
    top_k,
    top_p,
    min_p,
    seeds,
    choices,
    out_index,
    last_token,
    length,
    history,
    turn,
    ring,
    stamps,
    tokens,
    S,
    C,
    padding,
    RING: tl.constexpr,
    RING_WIDTH: tl.constexpr,
    STAMP: tl.constexpr,
    WIDTH: tl.constexpr,
    KEPT: tl.constexpr,
    HISTORY: tl.constexpr,
    PDL: tl.constexpr,
):
    release_next(PDL)
    row = tl.program_id(0)
    wait_previous(PDL)
    slot = tl.load(slots + row)
    index = tl.load(out_index + slot)
    best, token = _best(value, ids, row, S, WIDTH)
    if KEPT > 0:
        heat = tl.load(temperature + slot)
        k = tl.load(top_k + slot)
        if (heat >= COLDEST) & (k > 0) & (k <= FEW):
            token = _chosen(
                candidates + row * C,
                candidate_ids + row * C,
                heat,
                k,
                tl.load(top_p + slot),
                tl.load(min_p + slot),
                tl.load(seeds + slot),
                tl.load(choices + slot),
                index,
                C,
                KEPT,
            )
    good = (best > float("-inf")) & (best < float("inf"))
    token = tl.where(good, token, -1).to(tl.int32)
    tl.store(tokens + row, token)
    at = place_in_ring(tl.load(turn) - 1, RING)
    tl.store(ring + at * RING_WIDTH + row, token)
    if slot != padding:
        tl.store(last_token + slot, tl.maximum(token, 0))
        tl.store(out_index + slot, index + 1)
        if HISTORY > 0:
            place = tl.load(length + slot)
            tl.store(history + slot.to(tl.int64) * HISTORY + place, tl.maximum(token, 0), mask=place < HISTORY)
    if row == tl.num_programs(0) - 1:
        stamp(stamps + at * 2 + 1, STAMP)


def finish_step(
    state: SlotTensors,
    slots_R: torch.Tensor,
    value_RS: torch.Tensor,
    id_RS: torch.Tensor,
    candidates: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """reference.finish_step in one launch. Padding slots keep their state; their tokens mean nothing."""
    rows, slices = value_RS.shape
    assert value_RS.is_contiguous() and id_RS.is_contiguous() and rows <= state.ring.shape[1]
    tokens = torch.empty(rows, dtype=torch.int32, device=slots_R.device)
    values, ids = (value_RS, id_RS) if candidates is None else candidates
    assert values.is_contiguous() and ids.is_contiguous()
    width = min(MAX_WIDTH, max(32, triton.next_power_of_2(slices)))
    _finish_kernel[(rows,)](
        slots_R,
        value_RS,
        id_RS,
        values,
        ids,
        state.temperature,
        state.top_k,
        state.top_p,
        state.min_p,
        state.seed,
        state.choice,
        state.out_index,
        state.last_token,
        state.length,
        state.history,
        state.turn,
        state.ring,
        state.stamps,
        tokens,
        slices,
        values.shape[1],
        state.padding_slot,
        RING=len(state.ring),
        RING_WIDTH=state.ring.stride(0),
        STAMP=stamps_time(slots_R.device),
        WIDTH=width,
        KEPT=0 if candidates is None else triton.next_power_of_2(values.shape[1]),
        HISTORY=state.history.shape[1],
        num_warps=max(1, width // 256),
        **launch_options(slots_R.device),
    )
    return tokens


@triton.jit(do_not_specialize=["E"], do_not_specialize_on_alignment=["edits"])
def _edit_kernel(tables, edits, E, table_stride, EDITS: tl.constexpr):
    e = tl.program_id(0) * EDITS + tl.arange(0, EDITS)
    inside = e < E
    slot = tl.load(edits + e * 3, mask=inside, other=0).to(tl.int64)
    index = tl.load(edits + e * 3 + 1, mask=inside, other=0)
    tl.store(tables + slot * table_stride + index, tl.load(edits + e * 3 + 2, mask=inside, other=0), mask=inside)


def edit_slots(tables_SM: torch.Tensor, edits_E3: torch.Tensor) -> None:
    """reference.edit_slots; the edits may lie in pinned host memory. A plain launch, so what it wrote is settled."""
    count = len(edits_E3)
    _edit_kernel[(triton.cdiv(count, EDITS),)](tables_SM, edits_E3, count, tables_SM.stride(0), EDITS, num_warps=4)


@triton.jit(do_not_specialize=["B", "padding"], do_not_specialize_on_alignment=["slots"])
def _rows_kernel(rows, slots, B, padding, WIDTH, ROWS: tl.constexpr):
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slot = tl.load(slots + r, mask=r < B, other=0)
    tl.store(rows + r, tl.where(r < B, slot, padding), mask=r < WIDTH)


def set_rows(rows: torch.Tensor, slots_B: torch.Tensor, padding: int) -> None:
    """reference.set_rows; slots_B may lie in pinned host memory. A plain launch."""
    width = len(rows)
    _rows_kernel[(triton.cdiv(width, EDITS),)](rows, slots_B, len(slots_B), padding, width, EDITS, num_warps=4)
