"""Tool calls in a token stream: which tokens belong to one, what it says so far, and what turns out to be none."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass

from tpqwen.text.call_pieces import CallParser, CallPiece
from tpqwen.text.detokenizer import Detokenizer
from tpqwen.text.thinking import Scored
from tpqwen.text.tools import CallSyntax
from tpqwen.text.vocabulary import CALL_CLOSE, CALL_OPEN


@dataclass(slots=True)
class ToolCallDelta:
    """What one or several tokens add to a call. id and name are set once, with the call's first piece."""

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class GivenBack:
    """A call that was none: its text, marks included, and its tokens. Both are content."""

    text: str
    tokens: list[Scored]


class CallReader:
    """The calls of one answer, one open at a time. All decisions are made token by token.

    A call counts from the moment its name is known. Until then its text is kept, so that nothing is lost when it turns
    out to be no call; afterwards the arguments are what the model writes, as it writes them.
    """

    def __init__(self, syntax: CallSyntax, detokenizer: Callable[[], Detokenizer]) -> None:
        self.syntax = syntax
        self.count = 0
        self._new_detokenizer = detokenizer
        self._parser: CallParser | None = None
        self._detokenizer = detokenizer()
        self._texts: list[str] = []
        self._tokens: list[Scored] = []

    def resume(self) -> list[ToolCallDelta]:
        """Take up the call that the prompt leaves open; what it says already, since no answer has told it yet."""
        if self.syntax.begun is None:
            return []
        self.open((self.syntax.open_id, None))
        told = [self.feed((token, None)) for token in self.syntax.begun]
        return [delta for delta in told if delta is not None]

    @property
    def is_open(self) -> bool:
        """Whether tokens belong to a call now."""
        return self._parser is not None

    def open(self, token: Scored) -> None:
        """The opening mark has come."""
        self._parser = self.syntax.parser()
        self._detokenizer = self._new_detokenizer()
        self._texts, self._tokens = [CALL_OPEN], [token]

    def feed(self, token: Scored) -> ToolCallDelta | None:
        """A token of the open call."""
        return self._told(token, self._detokenizer.feed(token[0]))

    def close(self, mark: Scored | None) -> tuple[list[ToolCallDelta], GivenBack | None]:
        """The open call is over, by its closing mark or (None) by the end of the answer or the next call."""
        parser = self._parser
        assert parser is not None
        rest = self._detokenizer.flush()
        last = self._told(None, rest) if rest else None
        was_committed = parser.committed
        piece = parser.close()
        told = [d for d in (last, self._delta(piece, not was_committed) if piece else None) if d is not None]
        self._parser = None
        if parser.committed:
            return told, None
        if mark is not None:
            self._texts.append(CALL_CLOSE)
            self._tokens.append(mark)
        return told, GivenBack("".join(self._texts), self._tokens)

    def _told(self, token: Scored | None, text: str) -> ToolCallDelta | None:
        assert self._parser is not None
        was_committed = self._parser.committed
        if not was_committed:
            self._texts.append(text)
            if token is not None:
                self._tokens.append(token)
        piece = self._parser.feed(text) if text else None
        return None if piece is None else self._delta(piece, not was_committed)

    def _delta(self, piece: CallPiece, first: bool) -> ToolCallDelta | None:
        if not first:
            return ToolCallDelta(self.count - 1, piece.arguments) if piece.arguments else None
        self.count += 1
        self._texts, self._tokens = [], []
        return ToolCallDelta(self.count - 1, piece.arguments, f"call_{secrets.token_hex(12)}", piece.name)


def merged(deltas: list[ToolCallDelta]) -> list[ToolCallDelta]:
    """One entry for each call, in order."""
    calls: list[ToolCallDelta] = []
    parts: list[list[str]] = []
    for delta in deltas:
        if delta.id is not None:
            calls.append(ToolCallDelta(delta.index, "", delta.id, delta.name))
            parts.append([])
        parts[delta.index].append(delta.arguments)
    for call, texts in zip(calls, parts, strict=True):
        call.arguments = "".join(texts)
    return calls
