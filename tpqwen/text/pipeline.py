"""Deltas of token ids to text: detokenizer, thinking split, trimming and stop strings, one instance per sequence.

HTTP and the Python API share it. Tokens are taken one by one, so the result does not depend on how the stream was cut.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tpqwen.request import Delta, FinishReason, SamplingParams, TokenLogprob
from tpqwen.text.detokenizer import Detokenizer
from tpqwen.text.stop import StopMatcher
from tpqwen.text.thinking import NewlineTrimmer, State, ThinkingSplitter
from tpqwen.text.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class TokenScore:
    """One token of the answer with its log-probabilities. offset: characters of the answer before it."""

    token_id: int
    scores: TokenLogprob
    offset: int


@dataclass(slots=True)
class TextDelta:
    """What one Delta adds. content and reasoning may be empty while text is held back.

    token_ids are all tokens taken, end token and thinking marks included; scores only those of the content.
    finish_reason is set once, on the last one. stop is the stop string or id that ended the sequence. After a stop
    string (`finish_reason` set although the Delta had none) the caller closes the engine's iterator.
    """

    content: str = ""
    reasoning: str = ""
    token_ids: list[int] = field(default_factory=list)
    scores: list[TokenScore] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop: str | int | None = None


class OutputText:
    """The text of one sequence as it grows.

    start None: no thinking split, all text is content. Otherwise the state that the rendered prompt ends in.
    Stop strings are matched in the content, never in the reasoning (a model may write them while it thinks), and not in
    the text of the first min_tokens tokens.
    """

    def __init__(self, vocabulary: Vocabulary, params: SamplingParams, start: State | None = None) -> None:
        self.num_tokens = 0
        self.num_reasoning_tokens = 0
        self.finish_reason: FinishReason | None = None
        self._params = params
        self._splitter = None if start is None else ThinkingSplitter(vocabulary, start)
        self._state: State = State.REASONING if start is State.REASONING else State.CONTENT
        self._vocabulary = vocabulary
        self._detokenizer = self._new_detokenizer()
        self._trim = _reasoning_trimmer() if self._state is State.REASONING else None
        self._stops = StopMatcher(params.stop, params.include_stop_str_in_output) if params.stop else None
        self._offset = 0

    @property
    def num_stray_marks(self) -> int:
        """Thinking marks that stood where none belongs, and were dropped."""
        return self._splitter.num_stray_marks if self._splitter else 0

    def feed(self, delta: Delta) -> TextDelta:
        """Take one Delta. Nothing may follow a terminal one or one after which finish_reason is set."""
        out = TextDelta()
        last = len(delta.token_ids) - 1
        ended_by_token = delta.finish_reason is FinishReason.STOP and delta.stop_id is not None
        for k, token_id in enumerate(delta.token_ids):
            self.num_tokens += 1
            out.token_ids.append(token_id)
            is_end = ended_by_token and k == last and token_id == delta.stop_id
            if is_end and not self._params.include_stop_str_in_output:
                break
            self._take(token_id, delta.logprobs[k] if delta.logprobs else None, out)
            if out.stop is not None:
                break
        if delta.finish_reason is not None and out.stop is None:
            self._finish(out)
        if out.stop is not None:
            out.finish_reason = FinishReason.STOP
        elif delta.finish_reason is not None:
            out.finish_reason, out.stop = delta.finish_reason, delta.stop_id
        self.finish_reason = out.finish_reason
        return out

    def _take(self, token_id: int, scores: TokenLogprob | None, out: TextDelta) -> None:
        if self._splitter is None:
            self._content_token(token_id, scores, out)
            return
        tokens = self._splitter.feed(token_id, scores)
        if self._splitter.state is not self._state and self._splitter.state is not State.UNDECIDED:
            self._switch(self._splitter.state, out)
        for known, known_scores in tokens:
            if self._state is State.REASONING:
                self.num_reasoning_tokens += 1
                out.reasoning += self._trimmed(self._detokenizer.feed(known))
            else:
                self._content_token(known, known_scores, out)

    def _content_token(self, token_id: int, scores: TokenLogprob | None, out: TextDelta) -> None:
        if scores is not None:
            out.scores.append(TokenScore(token_id, scores, self._offset))
        text = self._trimmed(self._detokenizer.feed(token_id))
        if text:
            self._offset += len(text)
            self._show(text, out)

    def _show(self, text: str, out: TextDelta) -> None:
        """Content through the stop strings."""
        if self._stops is None or self.num_tokens <= self._params.min_tokens:
            out.content += text
            return
        out.content += self._stops.feed(text)
        out.stop = self._stops.matched

    def _switch(self, state: State, out: TextDelta) -> None:
        """Pass a thinking mark: finish the text before it, begin the one after it."""
        self._end_of_text(out)
        self._trim = _reasoning_trimmer() if state is State.REASONING else _answer_trimmer()
        self._state = state
        self._detokenizer = self._new_detokenizer()

    def _end_of_text(self, out: TextDelta) -> None:
        rest = self._trimmed(self._detokenizer.flush())
        if not rest:
            return
        if self._state is State.REASONING:
            out.reasoning += rest
        else:
            self._show(rest, out)

    def _finish(self, out: TextDelta) -> None:
        if self._splitter is not None:
            for token_id, scores in self._splitter.flush():
                self._content_token(token_id, scores, out)
        if out.stop is None:
            self._end_of_text(out)
        if self._stops is not None and out.stop is None:
            out.content += self._stops.flush()

    def _trimmed(self, text: str) -> str:
        return self._trim.feed(text) if self._trim is not None else text

    def _new_detokenizer(self) -> Detokenizer:
        return Detokenizer(self._vocabulary, self._params.skip_special_tokens)


def _reasoning_trimmer() -> NewlineTrimmer:
    return NewlineTrimmer(leading=True, trailing=True)


def _answer_trimmer() -> NewlineTrimmer:
    return NewlineTrimmer(leading=True, trailing=False)
