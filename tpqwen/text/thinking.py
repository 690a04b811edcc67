"""Splits a token stream into reasoning and answer at the thinking marks, by token id."""

from __future__ import annotations

from enum import Enum

from tpqwen.request import TokenLogprob
from tpqwen.text.vocabulary import Vocabulary

Scored = tuple[int, TokenLogprob | None]  # a token id and its log-probabilities, where asked for


class State(Enum):
    """Where the stream is. UNDECIDED: only white space so far, so the model may still open a block."""

    UNDECIDED = "undecided"
    REASONING = "reasoning"
    CONTENT = "content"


class ThinkingSplitter:
    """Sorts tokens into State.REASONING and State.CONTENT; the marks themselves belong to neither.

    It looks at ids alone, so that no cutting of the text can hide a mark. White space before the first decisive token
    is kept until it is known where it belongs: dropped before a thinking block, content otherwise.
    """

    def __init__(self, vocabulary: Vocabulary, start: State) -> None:
        self.state = start
        self.num_stray_marks = 0
        self._vocabulary = vocabulary
        self._open, self._close = vocabulary.think_open, vocabulary.think_close
        self._waiting: list[Scored] = []

    def feed(self, token_id: int, scores: TokenLogprob | None = None) -> list[Scored]:
        """Tokens that are now known to belong to `self.state` (as it is after the call), oldest first."""
        if self.state is State.REASONING:
            if token_id != self._close:
                return [(token_id, scores)]
            self.state = State.CONTENT
            return []
        if self.state is State.CONTENT:
            if token_id not in (self._open, self._close):
                return [(token_id, scores)]
            self.num_stray_marks += 1
            return []
        return self._decide(token_id, scores)

    def flush(self) -> list[Scored]:
        """White space that nothing followed: content."""
        waiting, self._waiting = self._waiting, []
        if waiting:
            self.state = State.CONTENT
        return waiting

    def _decide(self, token_id: int, scores: TokenLogprob | None) -> list[Scored]:
        if token_id == self._open:
            self.state = State.REASONING
            self._waiting.clear()
            return []
        if token_id == self._close:
            self.num_stray_marks += 1
            return []
        self._waiting.append((token_id, scores))
        if self._vocabulary.bytes_of(token_id).isspace():
            return []
        return self.flush()


class NewlineTrimmer:
    """Streaming strip of newlines: leading ones if asked, trailing ones held, to be dropped or fetched at the end."""

    def __init__(self, leading: bool, trailing: bool) -> None:
        self._leading = leading
        self._trailing = trailing
        self._held = ""

    def feed(self, text: str) -> str:
        """The text that is certain to stay."""
        if self._leading:
            text = text.lstrip("\n")
            if not text:
                return ""
            self._leading = False
        if not self._trailing:
            return text
        text = self._held + text
        kept = text.rstrip("\n")
        self._held = text[len(kept) :]
        return kept

    def drop(self) -> str:
        """The trailing newlines that are held; they are held no longer."""
        held, self._held = self._held, ""
        return held


def start_state(vocabulary: Vocabulary, prompt_ids: list[int]) -> State:
    """The state that a rendered prompt ends in: read from the ids after its last turn start, never from a flag.

    Earlier turns don't count, and control tokens typed by a user are plain text there.
    """
    if vocabulary.think_open is None or vocabulary.think_close is None:
        return State.CONTENT
    for token_id in reversed(prompt_ids):
        if token_id == vocabulary.think_open:
            return State.REASONING
        if token_id == vocabulary.think_close:
            return State.CONTENT
        if token_id == vocabulary.turn_start:
            break
    return State.UNDECIDED
