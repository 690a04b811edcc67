"""What the exchanges of one rank work on (kernels/exchange.py), and which messages it takes. No Triton."""

from __future__ import annotations

from dataclasses import dataclass

import torch

WORD_BYTES = 4  # of data, in a stored word of 8
WORDS = 256  # of one program
MAX_PROGRAMS = 2048  # of so few threads that they surely run at once


@dataclass(frozen=True)
class Mailbox:
    """All but `stop` and `inboxes` is zero before the first exchange.

    inbox: int64 [2, size, programs, WORDS]; inboxes: int64 [size], the addresses of all ranks' inboxes as this one
    reaches them; counts: int32 [programs], exchanges so far; stop: int32 [1] in pinned memory, not zero: wait no more;
    halted: int32 [1], not zero once a program has seen that.
    """

    rank: int
    inbox: torch.Tensor
    inboxes: torch.Tensor
    counts: torch.Tensor
    halted: torch.Tensor
    stop: torch.Tensor

    @property
    def size(self) -> int:
        """How many ranks."""
        return len(self.inboxes)

    @property
    def max_bytes(self) -> int:
        """Of the largest message."""
        return len(self.counts) * WORDS * WORD_BYTES


def inbox_shape(size: int, max_bytes: int) -> tuple[int, int, int, int]:
    """Of the inbox for messages of so many bytes among so many ranks."""
    programs = -(-max_bytes // (WORDS * WORD_BYTES))
    assert programs <= MAX_PROGRAMS, f"{programs} programs might not run at once"
    return 2, size, programs, WORDS


def blank(rank: int, size: int, max_bytes: int, device: torch.device) -> Mailbox:
    """A mailbox that nobody sends to, with an inbox of no size."""
    shape = inbox_shape(size, max_bytes)
    return Mailbox(
        rank,
        inbox=torch.zeros(0, dtype=torch.int64, device=device),
        inboxes=torch.zeros(size, dtype=torch.int64, device=device),
        counts=torch.zeros(shape[2], dtype=torch.int32, device=device),
        halted=torch.zeros(1, dtype=torch.int32, device=device),
        stop=torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda"),
    )


def fits(x: torch.Tensor, max_bytes: int, *, summed: bool) -> bool:
    """Whether a tensor may be exchanged: by its shape and dtype alone, so that all ranks answer alike."""
    whole = x.nbytes % WORD_BYTES == 0
    return 0 < x.nbytes <= max_bytes and whole and (not summed or (x.is_floating_point() and x.itemsize <= 4))
