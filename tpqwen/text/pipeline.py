"""Deltas of token ids to text: detokenizer, thinking split, tool calls, trimming and stop strings, one per sequence.

HTTP and the Python API share it. Tokens are taken one by one, or together where that makes no difference, so the result
does not depend on how the stream was cut.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tpqwen.request import Delta, FinishReason, SamplingParams, TokenLogprob
from tpqwen.text.calls import CallReader, GivenBack, ToolCallDelta
from tpqwen.text.detokenizer import Detokenizer
from tpqwen.text.stop import StopMatcher
from tpqwen.text.thinking import NewlineTrimmer, Scored, State, ThinkingSplitter
from tpqwen.text.tools import CallSyntax
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

    token_ids are all tokens taken, end token and marks included; scores only those of the content.
    finish_reason is set once, on the last one. stop is the stop string or id that ended the sequence. After a stop
    string (`finish_reason` set although the Delta had none) the caller closes the engine's iterator.
    """

    content: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCallDelta] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    scores: list[TokenScore] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop: str | int | None = None
    prompt_scores: list[TokenLogprob] | None = None  # of prompt tokens 1, 2, ...; on the first one
    pooled: bytes | None = None


class OutputText:
    """The text of one sequence as it grows.

    start None: no thinking split, all text is content. Otherwise the state that the rendered prompt ends in.
    calls None: tool calls are not looked for, their marks are text.
    Stop strings are matched in the content, never in reasoning or arguments (a model may write them there), and not in
    the text of the first min_tokens tokens. Newlines between the content and a tool call are dropped.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        params: SamplingParams,
        start: State | None = None,
        calls: CallSyntax | None = None,
    ) -> None:
        self.num_tokens = 0
        self.num_reasoning_tokens = 0
        self.finish_reason: FinishReason | None = None
        self._params = params
        self._splitter = None if start is None else ThinkingSplitter(vocabulary, start)
        self._state: State = State.REASONING if start is State.REASONING else State.CONTENT
        self._vocabulary = vocabulary
        self._detokenizer = self._new_detokenizer()
        self._trim = _reasoning_trimmer() if self._state is State.REASONING else None
        self._stops = self._new_stops()
        self._calls = None if calls is None else CallReader(calls, self._new_detokenizer)
        self._resumed = self._calls.resume() if self._calls is not None else []
        self._tail = None if calls is None else NewlineTrimmer(leading=False, trailing=True)
        self._offset = 0
        self._marks = _marks(vocabulary, self._splitter, calls)

    @property
    def num_stray_marks(self) -> int:
        """Thinking marks that stood where none belongs, and were dropped."""
        return self._splitter.num_stray_marks if self._splitter else 0

    def feed(self, delta: Delta) -> TextDelta:
        """Take one Delta. Nothing may follow a terminal one or one after which finish_reason is set."""
        out = TextDelta(prompt_scores=delta.prompt_logprobs, pooled=delta.pooled)
        if self._resumed:
            self._tell(self._resumed, out)
            self._resumed = []
        if self._is_plain(delta):
            self._take_all(delta.token_ids, out)
            return out
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
        if out.finish_reason is FinishReason.STOP and self._calls is not None and self._calls.count:
            out.finish_reason = FinishReason.TOOL_CALLS
        self.finish_reason = out.finish_reason
        return out

    def _is_plain(self, delta: Delta) -> bool:
        """Whether all of it just continues the text at hand, so that its tokens need not be looked at one by one."""
        return (
            delta.finish_reason is None
            and delta.logprobs is None
            and self._stops is None
            and (self._splitter is None or self._splitter.state is self._state)
            and (self._calls is None or not self._calls.is_open)
            and self._marks.isdisjoint(delta.token_ids)
        )

    def _take_all(self, token_ids: list[int], out: TextDelta) -> None:
        self.num_tokens += len(token_ids)
        out.token_ids += token_ids
        text = self._trimmed(self._detokenizer.feed_all(token_ids))
        if self._state is State.REASONING:
            self.num_reasoning_tokens += len(token_ids)
            out.reasoning += text
        else:
            self._show(text, out)

    def _take(self, token_id: int, scores: TokenLogprob | None, out: TextDelta) -> None:
        if self._splitter is None:
            self._content_token((token_id, scores), out)
            return
        tokens = self._splitter.feed(token_id, scores)
        if self._splitter.state is not self._state and self._splitter.state is not State.UNDECIDED:
            self._switch(self._splitter.state, out)
        for token in tokens:
            if self._state is State.REASONING:
                self.num_reasoning_tokens += 1
                out.reasoning += self._trimmed(self._detokenizer.feed(token[0]))
            else:
                self._content_token(token, out)

    def _content_token(self, token: Scored, out: TextDelta) -> None:
        calls = self._calls
        if calls is not None and token[0] == calls.syntax.open_id:
            self._end_of_text(out)
            self._detokenizer = self._new_detokenizer()
            if calls.count and not calls.syntax.parallel:
                out.stop = token[0]
            elif out.stop is None:
                calls.open(token)
        elif calls is not None and calls.is_open:
            if token[0] == calls.syntax.close_id:
                self._close_call(token, out)
            elif told := calls.feed(token):
                self._tell([told], out)
        else:
            self._score(token, out)
            self._show(self._trimmed(self._detokenizer.feed(token[0])), out)

    def _close_call(self, mark: Scored | None, out: TextDelta) -> None:
        assert self._calls is not None
        told, given_back = self._calls.close(mark)
        self._tell(told, out)
        if given_back is not None:
            self._give_back(given_back, out)
        elif mark is not None and not self._calls.syntax.parallel:
            out.stop = mark[0]

    def _tell(self, told: list[ToolCallDelta], out: TextDelta) -> None:
        """Parts of calls. Before the first part of one, the content that was held back for its sake is settled."""
        for delta in told:
            if delta.id is not None and self._tail is not None:
                if self._stops is not None:
                    out.content += self._tail.feed(self._stops.flush())
                    self._stops = self._new_stops()
                self._tail.drop()
                if not self._offset:
                    self._trim = _answer_trimmer()
            if delta.id is None and out.tool_calls and out.tool_calls[-1].index == delta.index:
                out.tool_calls[-1].arguments += delta.arguments
            else:
                out.tool_calls.append(delta)

    def _give_back(self, call: GivenBack, out: TextDelta) -> None:
        for token in call.tokens:
            self._score(token, out)
        self._show(self._trimmed(call.text), out)

    def _score(self, token: Scored, out: TextDelta) -> None:
        if token[1] is not None:
            out.scores.append(TokenScore(token[0], token[1], self._offset))

    def _show(self, text: str, out: TextDelta) -> None:
        """Content through the stop strings."""
        if not text:
            return
        self._offset += len(text)
        if self._stops is not None and self.num_tokens > self._params.min_tokens:
            text = self._stops.feed(text)
            out.stop = self._stops.matched
        out.content += self._tail.feed(text) if self._tail is not None else text
        if out.stop is not None:
            self._settle(out)

    def _switch(self, state: State, out: TextDelta) -> None:
        """Pass a thinking mark: finish the text before it, begin the one after it."""
        self._end_of_text(out)
        self._trim = _reasoning_trimmer() if state is State.REASONING else _answer_trimmer()
        self._state = state
        self._detokenizer = self._new_detokenizer()

    def _end_of_text(self, out: TextDelta) -> None:
        """The end of a stretch of text: an open call, or what the detokenizer holds."""
        if self._calls is not None and self._calls.is_open:
            self._close_call(None, out)
            return
        rest = self._trimmed(self._detokenizer.flush())
        if self._state is State.REASONING:
            out.reasoning += rest
        else:
            self._show(rest, out)

    def _finish(self, out: TextDelta) -> None:
        if self._splitter is not None:
            for token in self._splitter.flush():
                self._content_token(token, out)
        if out.stop is None:
            self._end_of_text(out)
        if out.stop is not None:
            return
        if self._stops is not None:
            rest = self._stops.flush()
            out.content += self._tail.feed(rest) if self._tail is not None else rest
        self._settle(out)

    def _settle(self, out: TextDelta) -> None:
        """At the end of the answer: newlines that were held for a call that did not come belong to the content."""
        if self._tail is not None and self._calls is not None and not self._calls.count:
            out.content += self._tail.drop()

    def _trimmed(self, text: str) -> str:
        return self._trim.feed(text) if self._trim is not None else text

    def _new_detokenizer(self) -> Detokenizer:
        return Detokenizer(self._vocabulary, self._params.skip_special_tokens)

    def _new_stops(self) -> StopMatcher | None:
        params = self._params
        return StopMatcher(params.stop, params.include_stop_str_in_output) if params.stop else None


def _marks(vocabulary: Vocabulary, splitter: ThinkingSplitter | None, calls: CallSyntax | None) -> frozenset[int]:
    """Tokens that may change what follows them."""
    thinking = (vocabulary.think_open, vocabulary.think_close) if splitter is not None else ()
    opening = (calls.open_id,) if calls is not None else ()
    return frozenset(i for i in (*thinking, *opening) if i is not None)


def _reasoning_trimmer() -> NewlineTrimmer:
    return NewlineTrimmer(leading=True, trailing=True)


def _answer_trimmer() -> NewlineTrimmer:
    return NewlineTrimmer(leading=True, trailing=False)
