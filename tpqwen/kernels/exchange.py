"""Small sums and gathers over the ranks in one kernel, which writes into the other ranks' memory over NVLink.

NCCL's LL protocol, one-shot: a word of data travels with a flag in one 64-bit store, which arrives whole or not at all,
so nothing else has to be ordered: no fence, no barrier, no second trip. Program i owns words [i WORDS, (i + 1) WORDS)
of the message. It stores its rank's into every other rank's inbox, then looks at its own until all have come, and adds
them up in rank order.

- The flag is the program's own count of exchanges. All ranks run the same exchanges in the same order with the same
  shapes, so the counts of program i are equal everywhere, whatever other programs did: the grid need not agree on
  anything, and a CUDA graph may be replayed as it is.
- The inbox, [2, SIZE senders, programs, WORDS], has two halves, taken in turn. Two are enough: a rank writes into a
  half for exchange k + 2 only after it has seen every other rank's words of exchange k + 1. Those a rank sends only
  after its own exchange k, which read the half, has completed: exchanges are kernels of one stream, and none writes
  before wait_previous. Other kernels in between, NCCL's for instance, change nothing, for none touches the inbox.
- A program always sends all its WORDS, those beyond the message too. So in a half lie flags of exchange k or k - 2 and
  no others (of zero, before the first two: counts begin at 0, and the first flag is 1), and a count may wrap around.
- Programs only wait for their namesakes on other ranks, and send before they wait. That could lock up only if not all
  programs of a rank ran at once: MAX_PROGRAMS bounds them. The next kernel is released at once, so that it can fetch
  its weights meanwhile; it starts when all programs have begun, and so takes no room that one of them needs.
- A program that waits reads `halted` every few looks. Set, it ends without what is missing: the results mean nothing
  then, and the caller throws the pass away. It is set by a program that has seen `stop`, a word in the host's memory,
  which the first program reads every LOOK looks and the others seldom: the GPU reads the host's memory one read after
  another, 2 us each, so if all programs of a rank did, the others would wait for it, and so read too, without end.

Stores and loads are volatile, as NCCL's are. SIZE ranks, N words of the message.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from tpqwen.kernels.launch import launch_options, release_next, wait_previous
from tpqwen.kernels.mailbox import WORD_BYTES, WORDS, Mailbox, fits

WARPS = 2
LOOK = 256  # of the first program at the inbox, between two at the host's word
SELDOM = 64  # times LOOK: of any other program
BRIEFLY = 8  # looks between two at `halted`

ELEMENTS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def _widened(bits, ELEMENT: tl.constexpr):
    """fp32 of the two halves of each 32-bit word, the lower first; of an fp32 word twice the same."""
    if ELEMENT.primitive_bitwidth == 32:
        low = bits.to(tl.float32, bitcast=True)
        high = low
    else:
        low = bits.to(tl.int16).to(ELEMENT, bitcast=True).to(tl.float32)
        high = (bits >> 16).to(tl.int16).to(ELEMENT, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def _rounded(low, high, ELEMENT: tl.constexpr):
    """The reverse of _widened."""
    if ELEMENT.primitive_bitwidth == 32:
        bits = low.to(tl.int32, bitcast=True)
    else:
        low_bits = low.to(ELEMENT).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        bits = low_bits | (high.to(ELEMENT).to(tl.int16, bitcast=True).to(tl.int32) << 16)
    return bits


@triton.jit
def _send(to, words, WORDS: tl.constexpr, STRONG: tl.constexpr):
    """Store the words [WORDS], two at a time; plainly in the interpreter, which has no assembly."""
    even, odd = tl.split(tl.reshape(words, [WORDS // 2, 2]))
    pointers = to + 2 * tl.arange(0, WORDS // 2)
    if STRONG:
        tl.inline_asm_elementwise(
            "{ st.volatile.global.v2.u64 [$1], {$2, $3}; mov.u32 $0, 0; }",
            "=r,l,l,l",
            [pointers.to(tl.int64), even, odd],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        tl.store(pointers, even)
        tl.store(pointers + 1, odd)


@triton.jit(do_not_specialize=["N", "rank"], do_not_specialize_on_alignment=["stop"])
def _exchange_kernel(
    mine,
    residual,
    out,
    inbox,
    inboxes,
    counts,
    halted,
    stop,
    N,
    rank,
    SIZE: tl.constexpr,
    RANKS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    WORDS: tl.constexpr,
    ELEMENT: tl.constexpr,
    ADD: tl.constexpr,
    SEND: tl.constexpr,
    RECEIVE: tl.constexpr,
    LOOK: tl.constexpr,
    SELDOM: tl.constexpr,
    BRIEFLY: tl.constexpr,
    STRONG: tl.constexpr,
    PDL: tl.constexpr,
):
    """One exchange of N words; ELEMENT None gathers them. RANKS: SIZE, rounded up to a power of two."""
    release_next(PDL)
    program = tl.program_id(0)
    w = tl.max_contiguous(tl.arange(0, WORDS), 2)  # as threads take 64-bit words: so nothing moves between threads
    at = program * WORDS + w
    inside = at < N
    wait_previous(PDL)
    flag = tl.load(counts + program) + 1
    half = (flag & 1).to(tl.int64) * SIZE
    word = tl.load(mine + at, mask=inside, other=0)
    sent = (flag.to(tl.int64) << 32) | word.to(tl.uint32, bitcast=True).to(tl.int64)
    if SEND:
        for step in tl.static_range(1, SIZE):  # each rank begins with the next one, so that no inbox gets all at once
            to = tl.multiple_of(tl.load(inboxes + (rank + step) % SIZE).to(tl.pointer_type(tl.int64)), 16)
            _send(to + ((half + rank) * PROGRAMS + program) * WORDS, sent, WORDS, STRONG)
    if RECEIVE:
        if ADD:
            base_low, base_high = _widened(tl.load(residual + at, mask=inside, other=0), ELEMENT)
        sender = tl.arange(0, RANKS)[:, None]
        other = (sender < SIZE) & (sender != rank)
        came = inbox + ((half + sender) * PROGRAMS + program) * WORDS + w[None, :]
        words = tl.load(came, mask=other, other=sent[None, :], volatile=True)
        missing = tl.max(((words >> 32).to(tl.int32) != flag).to(tl.int32))
        looks = 0
        while missing != 0:
            words = tl.load(came, mask=other, other=sent[None, :], volatile=True)
            missing = tl.max(((words >> 32).to(tl.int32) != flag).to(tl.int32))
            looks += 1
            asks = (looks % LOOK == 0) & ((program == 0) | (looks % (LOOK * SELDOM) == 0))
            stopped = tl.load(stop, mask=asks, other=0, volatile=True)
            tl.store(halted, 1, mask=stopped != 0)
            stopped |= tl.load(halted, mask=looks % BRIEFLY == 0, other=0, volatile=True)
            missing = tl.where(stopped != 0, 0, missing)
        bits = words.to(tl.int32)
        if ELEMENT is None:
            tl.store(out + sender * N + at[None, :], bits, mask=(sender < SIZE) & inside[None, :])
        else:
            low, high = _widened(tl.sum(tl.where(sender == 0, bits, 0), axis=0), ELEMENT)
            for r in tl.static_range(1, SIZE):
                next_low, next_high = _widened(tl.sum(tl.where(sender == r, bits, 0), axis=0), ELEMENT)
                low += next_low
                high += next_high
            total = _rounded(low, high, ELEMENT)
            if ADD:
                low, high = _widened(total, ELEMENT)
                total = _rounded(base_low + low, base_high + high, ELEMENT)
            tl.store(out + at, total, mask=inside)
        tl.store(counts + program, flag)


def add_up(mailbox: Mailbox, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
    """reference.add_up: the ranks' x (contiguous) added up, and the residual where there is one; written over x."""
    launch(mailbox, x, x, residual)
    return x


def gather(mailbox: Mailbox, x: torch.Tensor) -> torch.Tensor:
    """Every rank's x (contiguous) stacked in rank order: [size, *x.shape]."""
    out = torch.empty((mailbox.size, *x.shape), dtype=x.dtype, device=x.device)
    launch(mailbox, x, out, summed=False)
    return out


def launch(
    mailbox: Mailbox,
    x: torch.Tensor,
    out: torch.Tensor,
    residual: torch.Tensor | None = None,
    *,
    summed: bool = True,
    phases: tuple[bool, bool] = (True, True),
) -> None:
    """One exchange. phases: whether to send and whether to receive; two launches for one make ranks take turns in one
    process. Raises ValueError when the tensors do not fit."""
    if not (fits(x, mailbox.max_bytes, summed=summed) and x.is_contiguous() and out.is_contiguous()):
        raise ValueError(f"no exchange of {tuple(x.shape)} {x.dtype}, at most {mailbox.max_bytes} bytes in one piece")
    arguments, options = _arguments(mailbox, x, out, residual, summed, phases)
    grid = (triton.cdiv(x.nbytes // WORD_BYTES, WORDS),)
    _exchange_kernel[grid](*arguments, **options)


def compile_for(
    mailbox: Mailbox, x: torch.Tensor, residual: torch.Tensor | None = None, *, summed: bool = True
) -> None:
    """Compile what an exchange of such tensors launches; nothing runs."""
    arguments, options = _arguments(mailbox, x, x, residual, summed, (True, True))
    _exchange_kernel.warmup(*arguments, grid=(1,), **options)


def _arguments(
    mailbox: Mailbox,
    x: torch.Tensor,
    out: torch.Tensor,
    residual: torch.Tensor | None,
    summed: bool,
    phases: tuple[bool, bool],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the kernel is called with: tensors and numbers, then the rest by name."""
    assert residual is None or (residual.is_contiguous() and residual.dtype == x.dtype)
    words, results = x.view(-1).view(torch.int32), out.view(-1).view(torch.int32)
    added = words if residual is None else residual.view(-1).view(torch.int32)
    options = {
        "SIZE": mailbox.size,
        "RANKS": triton.next_power_of_2(mailbox.size),
        "PROGRAMS": len(mailbox.counts),
        "WORDS": WORDS,
        "ELEMENT": ELEMENTS[x.dtype] if summed else None,
        "ADD": residual is not None,
        "SEND": phases[0],
        "RECEIVE": phases[1],
        "LOOK": LOOK,
        "SELDOM": SELDOM,
        "BRIEFLY": BRIEFLY,
        "STRONG": x.is_cuda,
        "num_warps": WARPS,
        **launch_options(x.device),
    }
    box = (mailbox.inbox, mailbox.inboxes, mailbox.counts, mailbox.halted, mailbox.stop)
    return (words, added, results, *box, len(words), mailbox.rank), options
