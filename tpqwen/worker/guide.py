"""Where one sequence stands in the form that its output must have, token by token.

Marks are told by their ids; what stands between them is a grammar's business. The state is a function of the output
tokens, so a preempted or resubmitted sequence is brought to where it was by giving it them again.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum, auto
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tpqwen.request import Guide

Masks = NDArray[np.int32]  # [R, words]; bit i % 32 of word i // 32 allows id i
ALL = np.int32(-1)


class Phase(Enum):
    """What comes next."""

    UNDECIDED = auto()  # a thinking block or the output itself
    THINKING = auto()
    LEAD = auto()  # after the block: an empty line or the output itself
    START = auto()
    ANSWER = auto()  # inside the answer's grammar
    FREE = auto()  # content that nothing binds
    CALL = auto()  # between the call marks
    AFTER = auto()  # after a call
    NEXT = auto()  # the next call's mark
    OVER = auto()  # complete; whatever comes is computed in vain
    BROKEN = auto()  # a token came that was not allowed: our bug, or two versions of one grammar


class Matcher(Protocol):
    """grammar.Matcher."""

    def take(self, token_id: int) -> bool: ...

    def fill(self, masks: Masks, row: int) -> None: ...


class Grammars(Protocol):
    """grammar.Vocabulary."""

    def matcher(self, compiled: bytes, stop_ids: tuple[int, ...]) -> Matcher: ...


class GuideState:
    """One sequence under its guide."""

    def __init__(self, guide: Guide, grammars: Grammars, output: Iterable[int] = ()) -> None:
        self._guide = guide
        self._grammars = grammars
        self._matcher: Matcher | None = None
        self._index = 0
        self.phase = Phase.THINKING if guide.inside else Phase.UNDECIDED if guide.may_think else Phase.START
        self._answer = grammars.matcher(guide.answer, guide.end_ids) if guide.answer else None
        for token in output:
            self.take(token)

    def take(self, token: int) -> None:
        """The next output token."""
        self._index += 1
        guide = self._guide
        if self.phase is Phase.UNDECIDED and token == guide.think_open:
            self.phase = Phase.THINKING
        elif self.phase is Phase.THINKING:
            self.phase = Phase.LEAD if token == guide.think_close else Phase.THINKING
        elif self.phase is Phase.LEAD and token in guide.blank_ids:
            self.phase = Phase.START
        elif self.phase in (Phase.UNDECIDED, Phase.LEAD, Phase.START):
            self._begin(token)
        elif self.phase in (Phase.ANSWER, Phase.CALL):
            self._match(token)
        elif self.phase is Phase.FREE:
            if token == guide.call_open and guide.calls >= 0:
                self._open_call()
        elif self.phase in (Phase.AFTER, Phase.NEXT):
            self._go_on(token)

    def fill(self, masks: Masks, row: int) -> None:
        """Write which ids may come next into masks[row]."""
        guide, words = self._guide, masks[row]
        words[:] = 0
        if self.phase in (Phase.UNDECIDED, Phase.LEAD, Phase.START):
            self._fill_start(masks, row)
            extra = {Phase.UNDECIDED: (guide.think_open,), Phase.LEAD: guide.blank_ids}.get(self.phase, ())
            _allow(words, extra)
        elif self.phase is Phase.THINKING:  # it must not end before there is an output
            words[:] = ALL
            _forbid(words, guide.end_ids)
        elif self.phase is Phase.ANSWER and self._answer is not None:
            self._answer.fill(masks, row)
        elif self.phase is Phase.CALL and self._matcher is not None:
            self._matcher.fill(masks, row)
        elif self.phase is Phase.AFTER:
            _allow(words, guide.end_ids)
            _allow(words, (guide.newline_id, guide.call_open) if guide.parallel else ())
        elif self.phase is Phase.NEXT:
            _allow(words, (guide.call_open,))
        elif self.phase is not Phase.BROKEN:
            words[:] = ALL
        if self._index < guide.min_tokens:
            _forbid(words, guide.forbidden_ids)

    def _fill_start(self, masks: Masks, row: int) -> None:
        if self._guide.calls <= 0 and self._answer is None:
            masks[row] = ALL
        elif self._guide.calls <= 0 and self._answer is not None:
            self._answer.fill(masks, row)
        if self._guide.calls >= 0:
            _allow(masks[row], (self._guide.call_open,))

    def _begin(self, token: int) -> None:
        """The output's first token."""
        if token == self._guide.call_open and self._guide.calls >= 0:
            self._open_call()
        elif self._guide.calls > 0:
            self.phase = Phase.BROKEN
        elif self._answer is not None:
            self.phase = Phase.ANSWER
            self._match(token)
        else:
            self.phase = Phase.FREE

    def _open_call(self) -> None:
        guide = self._guide
        self.phase = Phase.CALL
        self._matcher = self._grammars.matcher(guide.call, (guide.call_close,)) if guide.call else None

    def _match(self, token: int) -> None:
        matcher = self._answer if self.phase is Phase.ANSWER else self._matcher
        if matcher is not None and not matcher.take(token):
            self.phase = Phase.BROKEN
        elif self.phase is Phase.ANSWER and token in self._guide.end_ids:
            self.phase = Phase.OVER
        elif self.phase is Phase.CALL and token == self._guide.call_close:
            bound = self._guide.calls > 0 or self._answer is not None
            self.phase = Phase.AFTER if bound else Phase.FREE

    def _go_on(self, token: int) -> None:
        """After a call."""
        if token == self._guide.call_open:
            self._open_call()
        elif token == self._guide.newline_id and self.phase is Phase.AFTER:
            self.phase = Phase.NEXT
        else:
            self.phase = Phase.OVER if token in self._guide.end_ids else Phase.BROKEN


def _allow(words: Masks, ids: Iterable[int]) -> None:
    for i in ids:
        if i >= 0:
            words.view(np.uint32)[i >> 5] |= np.uint32(1 << (i & 31))


def _forbid(words: Masks, ids: Iterable[int]) -> None:
    """Take the ids out, unless nothing else is left."""
    before = words.copy()
    for i in ids:
        words.view(np.uint32)[i >> 5] &= np.uint32(~(1 << (i & 31)) & 0xFFFFFFFF)
    if not words.any():
        words[:] = before
