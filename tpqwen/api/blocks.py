"""An answer as a row of blocks (reasoning, text, tool calls), the way Responses and Anthropic messages are made.

Whole answers and streams go through the same object, so they cannot differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from tpqwen.text.pipeline import TextDelta, TokenScore


class Kind(Enum):
    """What a block holds; arguments of a call are text as well."""

    REASONING = "reasoning"
    TEXT = "text"
    CALL = "call"


class Step(Enum):
    """What happens to a block: each is opened once, added to, and closed once before the next is opened."""

    OPEN = "open"
    ADD = "add"
    CLOSE = "close"


@dataclass
class Block:
    """index: its place in the answer. call_id and name are a call's own."""

    kind: Kind
    index: int
    text: str = ""
    call_id: str = ""
    name: str = ""
    scores: list[TokenScore] = field(default_factory=list)


class Change(NamedTuple):
    """text and scores: what is added."""

    step: Step
    block: Block
    text: str = ""
    scores: tuple[TokenScore, ...] = ()


class Blocks:
    """Grows with the deltas of one choice."""

    def __init__(self) -> None:
        self.all: list[Block] = []
        self._open: Block | None = None
        self._call: int | None = None  # index of the call that is open, as the text layer counts

    def feed(self, delta: TextDelta) -> Iterator[Change]:
        """Changes in order. With the last delta the open block is closed; an answer without any gets an empty text."""
        if delta.reasoning:
            yield from self._add(Kind.REASONING, delta.reasoning)
        if delta.content or delta.scores:
            yield from self._add(Kind.TEXT, delta.content, tuple(delta.scores))
        for call in delta.tool_calls:
            if self._call != call.index or self._open is None or self._open.kind is not Kind.CALL:
                self._call = call.index
                yield from self._begin(Block(Kind.CALL, len(self.all), call_id=call.id or "", name=call.name or ""))
            yield from self._add(Kind.CALL, call.arguments)
        if delta.finish_reason is not None:
            if not any(b.kind is not Kind.REASONING for b in self.all):
                yield from self._begin(Block(Kind.TEXT, len(self.all)))
            yield from self._close()

    def _add(self, kind: Kind, text: str, scores: tuple[TokenScore, ...] = ()) -> Iterator[Change]:
        if self._open is None or self._open.kind is not kind:
            yield from self._begin(Block(kind, len(self.all)))
        assert self._open is not None
        self._open.text += text
        self._open.scores += scores
        if text or scores:
            yield Change(Step.ADD, self._open, text, scores)

    def _begin(self, block: Block) -> Iterator[Change]:
        yield from self._close()
        self._open = block
        self.all.append(block)
        yield Change(Step.OPEN, block)

    def _close(self) -> Iterator[Change]:
        if self._open is not None:
            yield Change(Step.CLOSE, self._open)
            self._open = None
