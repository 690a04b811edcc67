"""Speculation in plain torch: the specification of kernels/drafting.py, and what a CPU runs.

B rows, T tokens of a row in one pass: its last token and T - 1 drafted ones. A draft is a guess at no cost: what
followed the latest place in the sequence that ends as the sequence does now (prompt lookup). Every drafted token is
sampled by the ordinary rule, whose noise depends on the output index alone, so a draft that agrees is the token that
an ordinary step would have given, and one that does not is replaced by it. All is integers: ranks need not talk.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from tpqwen.kernels.context import DraftInputs, SlotTensors

LONGEST_MATCH = 3  # last tokens that are compared; more would hardly change which place is found, fewer often would
SKIPPED = -2  # in the ring: this drafted token was not the row's


def find_draft(tokens_L: torch.Tensor, count: int) -> torch.Tensor:
    """What may follow the L >= 1 tokens: `count` of them.

    The place is the one before which most of the last LONGEST_MATCH tokens stand, the latest of equals. All rows of a
    pass run as many tokens, so a guess costs nothing: where nothing matches, the last token is repeated. What runs into
    the end goes on from the place again, as a loop would.
    """
    length = len(tokens_L)
    matched = torch.zeros(length, dtype=torch.int64, device=tokens_L.device)
    alive = torch.ones_like(matched, dtype=torch.bool)
    for back in range(1, min(LONGEST_MATCH, length) + 1):
        alive[:back] = False  # before place p there are p tokens
        alive[back:] &= tokens_L[: length - back] == tokens_L[length - back]
        matched += alive
    place = int((matched * length + torch.arange(length, device=tokens_L.device)).argmax())
    period = length - place
    return tokens_L[place + torch.arange(count, device=tokens_L.device) % period]


def begin_drafts(state: SlotTensors, slots_B: torch.Tensor, block_size: int, count: int) -> DraftInputs:
    """Start a speculative pass: count it, and draft `count` tokens behind each row's last one. No slot advances yet.

    Rows of the padding slot get positions 0 and no place in the cache. Other rows' tables hold all their positions.
    """
    state.turn.add_(1)
    slots, width = slots_B.long(), count + 1
    active = (slots != state.padding_slot)[:, None]
    known = state.length[slots]
    lines = [state.history[slot, : length + 1] for slot, length in zip(slots.tolist(), known.tolist(), strict=True)]
    drafts = [torch.cat([line[-1:], find_draft(line, count)]) for line in lines]
    ids = torch.stack(drafts) if drafts else state.history[:0, :width]
    steps = torch.arange(width, dtype=torch.int32, device=slots.device)
    positions = torch.where(active, known[:, None] + steps, 0)
    blocks = state.tables_SM[slots[:, None], (positions // block_size).long()].long()
    cache_slots = torch.where(active, blocks * block_size + positions % block_size, -1)
    each = slots.repeat_interleave(width)
    rows = replace(
        scratch_rows(state, len(each)),
        out_index=(state.out_index[slots][:, None] + steps).flatten(),
        **{name: getattr(state, name)[each] for name in ("seed", "choice", "top_k", "temperature", "top_p", "min_p")},
    )
    order = torch.arange(len(each), dtype=torch.int32, device=slots.device)
    lengths = torch.where(active[:, 0], known + width, width)
    return DraftInputs(ids.flatten(), positions.flatten(), cache_slots.flatten(), lengths, order, rows)


def scratch_rows(state: SlotTensors, count: int) -> SlotTensors:
    """Slots for `count` tokens that are sampled and settle nothing: what a pass would leave in them is thrown away."""
    device = state.length.device

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    return SlotTensors(
        tables_SM=state.tables_SM,
        length=empty(count + 1),
        last_token=empty(count),
        out_index=empty(count),
        seed=empty(count, dtype=torch.int64),
        choice=empty(count),
        top_k=empty(count),
        temperature=empty(count, dtype=torch.float32),
        top_p=empty(count, dtype=torch.float32),
        min_p=empty(count, dtype=torch.float32),
        turn=state.turn,
        ring=empty(1, count),
        stamps=empty(1, 2, dtype=torch.int64),
        history=empty(0, 0),
    )


def accept_drafts(state: SlotTensors, slots_B: torch.Tensor, ids: torch.Tensor, tokens: torch.Tensor) -> None:
    """End a speculative pass: each row keeps its sampled tokens up to the first that was not drafted, and its slot
    stands behind them as if they had been sampled one by one.

    ids and tokens int32 [B * T]: what ran, and what was sampled behind each of it (-1: bad logits, agrees with nothing
    and counts as 0 from there on). In the ring's row stand B * T tokens, SKIPPED where none was kept.
    """
    slots = slots_B.long()
    tokens_BT, ids_BT = (x.view(len(slots), -1) for x in (tokens, ids))
    agree = (tokens_BT[:, :-1] == ids_BT[:, 1:]).int().cumprod(1)
    counts = agree.sum(1) + 1
    steps = torch.arange(tokens_BT.shape[1], device=slots.device)
    kept = steps < counts[:, None]
    state.ring[(state.turn - 1) % len(state.ring), : len(tokens)] = (
        torch.where(kept, tokens_BT, SKIPPED).int().flatten()
    )
    real = slots != state.padding_slot
    slots, counts, kept, tokens_BT = slots[real], counts[real], kept[real], tokens_BT[real].clamp(min=0)
    places = state.length[slots][:, None] + 1 + steps
    where = slots[:, None].expand_as(places)
    state.history[where[kept], places[kept].long()] = tokens_BT[kept]
    state.last_token[slots] = tokens_BT.gather(1, counts[:, None] - 1)[:, 0]
    state.length[slots] += counts.int()
    state.out_index[slots] += counts.int()
