"""Exchanges among ranks that take turns in one process: all send, then all receive. Kernel against reference."""

from __future__ import annotations

import pytest
import torch

from tpqwen.kernels import exchange, mailbox, reference
from tpqwen.kernels.mailbox import WORD_BYTES, WORDS, Mailbox

MAX_BYTES = 6 * 1024


def mailboxes(size: int, device: torch.device, counted: int = 0) -> list[Mailbox]:
    """Of ranks that reach each other, after so many exchanges of each program."""
    shape = mailbox.inbox_shape(size, MAX_BYTES)
    boxes = [torch.zeros(shape, dtype=torch.int64, device=device) for _ in range(size)]
    addresses = torch.tensor([box.data_ptr() for box in boxes], device=device)
    return [
        Mailbox(
            rank,
            box,
            addresses,
            torch.full((shape[2],), counted, dtype=torch.int32, device=device),
            torch.zeros(1, dtype=torch.int32, device=device),
            torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda"),
        )
        for rank, box in enumerate(boxes)
    ]


def numbers(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Random ones; in bfloat16, which the interpreter does not round to the nearest, such as add up exactly."""
    if dtype == torch.bfloat16 and not torch.cuda.is_available():
        return torch.randint(-30, 30, (rows, columns)).to(dtype)
    return torch.randn(rows, columns).to(dtype)


def add_up(boxes: list[Mailbox], parts: list[torch.Tensor], residual: torch.Tensor | None) -> list[torch.Tensor]:
    """Every rank's result."""
    outs = [torch.empty_like(x) for x in parts]
    for phases in ((True, False), (False, True)):
        for box, x, out in zip(boxes, parts, outs, strict=True):
            exchange.launch(box, x, out, residual, phases=phases)
    return outs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_add_up_in_order_whatever_sizes_follow_each_other(
    size: int, dtype: torch.dtype, device: torch.device
) -> None:
    boxes = mailboxes(size, device)
    torch.manual_seed(size)
    for turn, rows in enumerate((1, 7, 7, 1, 3, 6, 1)):
        parts = [numbers(rows, 192, dtype).to(device) for _ in range(size)]
        residual = numbers(rows, 192, dtype).to(device) if turn % 3 else None
        expected = reference.add_up(parts, residual)
        for out in add_up(boxes, parts, residual):
            assert torch.equal(out, expected), f"exchange {turn}"
    used = -(-7 * 192 * dtype.itemsize // (WORDS * WORD_BYTES))
    counts = boxes[0].counts.tolist()
    assert counts[0] == 7 and counts[used - 1] >= 2 and not any(counts[used:])
    assert all(box.counts.tolist() == counts for box in boxes)


def test_ranks_gather_any_words(device: torch.device) -> None:
    boxes = mailboxes(4, device)
    for dtype, shape in (
        (torch.float64, (2, 3)),
        (torch.int32, (1,)),
        (torch.int64, (5, 64)),
        (torch.float32, (7, 96)),
    ):
        parts = [(torch.randn(shape) * 1000).to(device, dtype) for _ in boxes]
        outs = [torch.empty(4, *shape, dtype=dtype, device=device) for _ in boxes]
        for phases in ((True, False), (False, True)):
            for box, x, out in zip(boxes, parts, outs, strict=True):
                exchange.launch(box, x, out, summed=False, phases=phases)
        for out in outs:
            assert torch.equal(out, torch.stack(parts))


@pytest.mark.parametrize("counted", [2**31 - 3, -4])
def test_counts_of_exchanges_wrap_around(counted: int, device: torch.device) -> None:
    boxes = mailboxes(2, device, counted)
    for turn in range(6):
        parts = [torch.full((2, 192), float(turn + rank), device=device) for rank in range(2)]
        for out in add_up(boxes, parts, None):
            assert torch.equal(out, torch.full((2, 192), 2.0 * turn + 1, device=device))


def test_what_a_rank_that_is_ahead_sends_does_not_hide_what_another_has_yet_to_read(device: torch.device) -> None:
    ahead, behind = mailboxes(2, device)
    a, b = ([torch.full((2, 192), 10.0 * turn + rank, device=device) for turn in range(6)] for rank in range(2))
    out = torch.empty_like(a[0])
    exchange.launch(ahead, a[0], out, phases=(True, False))
    for turn in range(5):
        exchange.launch(behind, b[turn], out, phases=(True, False))
        exchange.launch(ahead, a[turn], out, phases=(False, True))
        assert torch.equal(out, a[turn] + b[turn])
        exchange.launch(ahead, a[turn + 1], out, phases=(True, False))
        behind.stop.fill_(1)  # what is not there now never will be
        exchange.launch(behind, b[turn], out, phases=(False, True))
        assert torch.equal(out, a[turn] + b[turn])


def test_a_rank_that_is_told_to_stop_waits_no_more(device: torch.device) -> None:
    box, other = mailboxes(2, device)
    box.stop.fill_(1)
    x = torch.ones(2, 192, device=device)
    exchange.add_up(box, x)
    assert box.counts.tolist()[0] == 1
    assert box.halted.item() == 1, "later exchanges need not ask the host"
    exchange.add_up(box, x)
    assert box.counts.tolist()[0] == 2 and other.inbox.any(), "it has sent all the same"


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    box = mailboxes(2, device)[0]
    for x in (torch.ones(9000), torch.ones(3, dtype=torch.bfloat16), torch.ones(4, 2).t(), torch.ones(0)):
        with pytest.raises(ValueError, match="no exchange"):
            exchange.add_up(box, x.to(device))
    with pytest.raises(ValueError, match="float64"):
        exchange.add_up(box, torch.ones(3, dtype=torch.float64, device=device))
