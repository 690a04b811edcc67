"""OpenAI's answer bodies and stream events. A stream's usual event is one prepared prefix, the text, one suffix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from tpqwen.api.calls import Call
from tpqwen.api.failures import Failure
from tpqwen.api.info import ModelInfo
from tpqwen.api.prompts import EchoedPrompt, finite, legacy_logprobs, prompt_logprobs
from tpqwen.request import FinishReason, SamplingParams
from tpqwen.text.calls import ToolCallDelta, merged
from tpqwen.text.pipeline import TextDelta, TokenScore
from tpqwen.text.vocabulary import Vocabulary

_json = msgspec.json.encode
DONE = b"data: [DONE]\n\n"
COMMENT = b": waiting\n\n"


@dataclass(frozen=True)
class Usage:
    """Token counts of a whole HTTP request; every prompt counts once, however many choices it has."""

    prompt: int
    completion: int
    cached: int
    reasoning: int

    @property
    def fields(self) -> dict[str, Any]:
        """OpenAI's usage object."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning},
        }


@dataclass(frozen=True)
class Frame:
    """What all events and the body of one answer have in common."""

    request_id: str
    call: Call
    info: ModelInfo
    vocabulary: Vocabulary
    created: int
    params: SamplingParams
    prompt_ids: list[list[int]]

    @property
    def num_logprobs(self) -> int | None:
        return self.params.logprobs

    @property
    def n(self) -> int:
        return self.params.n


class WholeAnswer(Protocol):
    """Writes one kind of answer in one piece."""

    def body(self, deltas: Sequence[TextDelta], usage: Usage) -> bytes:
        """The whole answer from one complete delta for each choice."""


class Answer(WholeAnswer, Protocol):
    """Writes one kind of answer, whole or as a stream. Indexes are those of the choices."""

    def opening(self, index: int, first: TextDelta, usage: Usage) -> bytes:
        """Events before a choice's first delta; may be empty. usage: so far."""

    def events(self, index: int, delta: TextDelta, usage: Usage | None) -> bytes:
        """Events for a delta, several or none. usage: shown in each when given."""

    def ending(self, usage: Usage) -> bytes:
        """Events that end a stream in which every choice has ended."""

    def failed(self, failed: Failure) -> bytes:
        """The event that ends a stream that cannot go on."""


class _Writer:
    """Envelope and the short way for an event that holds text only."""

    prefix = ""
    kind = ""  # "object" of the body
    event_kind = ""  # "object" of an event

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        self._plain_heads: dict[tuple[int, str], bytes] = {}
        usage = b',"usage":null' if frame.call.include_usage else b""
        self._plain_tail = b'},"logprobs":null,"finish_reason":null}]' + usage + b"}\n\n"

    def envelope(self, kind: str, choices: list[dict[str, Any]], usage: Usage | None) -> dict[str, Any]:
        frame = self.frame
        out: dict[str, Any] = {
            "id": f"{self.prefix}-{frame.request_id}",
            "object": kind,
            "created": frame.created,
            "model": frame.info.name,
        }
        if frame.info.fingerprint is not None:
            out["system_fingerprint"] = frame.info.fingerprint
        out["choices"] = choices
        if usage is not None:
            out["usage"] = usage.fields
        return out

    def event(self, choices: list[dict[str, Any]], usage: Usage | None) -> bytes:
        envelope = self.envelope(self.event_kind, choices, usage)
        if self.frame.call.include_usage:
            envelope.setdefault("usage", None)
        return b"data: " + _json(envelope) + b"\n\n"

    def ending(self, usage: Usage) -> bytes:
        return (self.event([], usage) if self.frame.call.include_usage else b"") + DONE

    def failed(self, failed: Failure) -> bytes:
        return failed.event

    def plain(self, index: int, key: str, text: str, opening: bytes) -> bytes:
        """An event with one text. opening: the choice from its index up to the text's key, as JSON."""
        head = self._plain_heads.get((index, key))
        if head is None:
            whole = _json(self.envelope(self.event_kind, [], None))
            cut = whole.index(b'"choices":[') + len(b'"choices":[')
            head = b"data: " + whole[:cut] + b'{"index":%d,' % index + opening
            self._plain_heads[index, key] = head
        return head + _json(text) + self._plain_tail

    def needs_more(self, delta: TextDelta, usage: Usage | None) -> bool:
        """Whether an event must carry more than text."""
        return usage is not None or bool(delta.scores or delta.tool_calls) or self.frame.call.return_token_ids

    def ids(self, delta: TextDelta) -> dict[str, Any]:
        return {"token_ids": delta.token_ids} if self.frame.call.return_token_ids else {}


class ChatAnswer(_Writer):
    """/v1/chat/completions."""

    prefix = "chatcmpl"
    kind = "chat.completion"
    event_kind = "chat.completion.chunk"

    def opening(self, index: int, first: TextDelta, usage: Usage) -> bytes:
        choice = {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        if not self.frame.call.return_token_ids:
            return self.event([choice], None)
        envelope = self.envelope(self.event_kind, [choice], None) | {"prompt_token_ids": self.frame.prompt_ids[0]}
        return b"data: " + _json(envelope) + b"\n\n"

    def events(self, index: int, delta: TextDelta, usage: Usage | None) -> bytes:
        out = b""
        if self.needs_more(delta, usage):
            out = self._full_event(index, delta, usage)
        elif delta.content and not delta.reasoning:
            out = self.plain(index, "content", delta.content, b'"delta":{"content":')
        elif delta.content or delta.reasoning:
            out = self._full_event(index, delta, None)
        if delta.finish_reason is not None:
            choice = {"index": index, "delta": {}, "logprobs": None, "finish_reason": delta.finish_reason}
            out += self.event([choice], usage)
        return out

    def body(self, deltas: Sequence[TextDelta], usage: Usage) -> bytes:
        choices = []
        for i, delta in enumerate(deltas):
            reasoning = delta.reasoning or None
            message = {
                "role": "assistant",
                "content": delta.content or None if delta.tool_calls else delta.content,
                "refusal": None,
                **({"reasoning_content": reasoning, "reasoning": reasoning} if reasoning else {}),
                **({"tool_calls": [_call(c) for c in merged(delta.tool_calls)]} if delta.tool_calls else {}),
            }
            choices.append(
                {
                    "index": i,
                    "message": message,
                    "logprobs": self._logprobs(delta),
                    "finish_reason": delta.finish_reason,
                    **self.ids(delta),
                }
            )
        envelope = self.envelope(self.kind, choices, usage)
        if self.frame.call.return_token_ids:
            envelope["prompt_token_ids"] = self.frame.prompt_ids[0]
        count = self.frame.params.prompt_logprobs
        if count is not None:
            ids, scores = self.frame.prompt_ids[0], deltas[0].prompt_scores
            envelope["prompt_logprobs"] = prompt_logprobs(self.frame.vocabulary, ids, scores, count)
        return _json(envelope)

    def _full_event(self, index: int, delta: TextDelta, usage: Usage | None) -> bytes:
        texts: dict[str, Any] = {}
        if delta.reasoning:
            texts = {"reasoning_content": delta.reasoning, "reasoning": delta.reasoning}
        if delta.content:
            texts["content"] = delta.content
        if delta.tool_calls:
            texts["tool_calls"] = [{"index": c.index, **_call(c)} for c in delta.tool_calls]
        if not (texts or delta.scores or self.frame.call.return_token_ids):
            return b""
        choice = {
            "index": index,
            "delta": texts,
            "logprobs": self._logprobs(delta),
            "finish_reason": None,
            **self.ids(delta),
        }
        return self.event([choice], usage)

    def _logprobs(self, delta: TextDelta) -> dict[str, Any] | None:
        if self.frame.num_logprobs is None or not (delta.scores or delta.finish_reason):
            return None
        frame, count = self.frame, self.frame.num_logprobs
        return {"content": [chat_logprob(frame.vocabulary, score, count) for score in delta.scores], "refusal": None}


class CompletionAnswer(_Writer):
    """/v1/completions."""

    prefix = "cmpl"
    kind = event_kind = "text_completion"

    def __init__(self, frame: Frame) -> None:
        super().__init__(frame)
        self._plain_tail = self._plain_tail[1:]  # no delta object to close
        self._opened: set[int] = set()
        echo = frame.call.options.get("echo", False)
        self._echoed = [EchoedPrompt.of(frame.vocabulary, ids) for ids in frame.prompt_ids] if echo else None

    def opening(self, index: int, first: TextDelta, usage: Usage) -> bytes:
        if self._echoed is None:
            return b""
        text, logprobs = self._prompt(index, first)
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None}
        return self.event([choice], None)

    def events(self, index: int, delta: TextDelta, usage: Usage | None) -> bytes:
        out = b""
        if self.needs_more(delta, usage):
            if delta.content or delta.scores or self.frame.call.return_token_ids:
                out = self.event([self._choice(index, delta, None) | self._prompt_once(index)], usage)
        elif delta.content:
            out = self.plain(index, "text", delta.content, b'"text":')
        if delta.finish_reason is not None:
            out += self.event([self._choice(index, TextDelta(), delta.finish_reason)], usage)
        return out

    def body(self, deltas: Sequence[TextDelta], usage: Usage) -> bytes:
        choices = [self._whole(i, d) | self._prompt_once(i) for i, d in enumerate(deltas)]
        return _json(self.envelope(self.kind, choices, usage))

    def _whole(self, index: int, delta: TextDelta) -> dict[str, Any]:
        choice = self._choice(index, delta, delta.finish_reason)
        if self._echoed is not None:
            text, logprobs = self._prompt(index, delta)
            choice["text"] = text + choice["text"]
            if logprobs is not None:
                choice["logprobs"] = {k: v + choice["logprobs"][k] for k, v in logprobs.items()}
        count = self.frame.call.options.get("prompt_logprobs")
        if count is not None:
            ids = self.frame.prompt_ids[index // self.frame.n]
            choice["prompt_logprobs"] = prompt_logprobs(self.frame.vocabulary, ids, delta.prompt_scores, count)
        return choice

    def _prompt(self, index: int, first: TextDelta) -> tuple[str, dict[str, Any] | None]:
        """The prompt's text and, where asked for, its logprobs object."""
        assert self._echoed is not None
        prompt, count = self._echoed[index // self.frame.n], self.frame.num_logprobs
        if count is None:
            return prompt.text, None
        scores = first.prompt_scores or []
        return prompt.text, legacy_logprobs(self.frame.vocabulary, prompt.ids, scores, prompt.offsets, count)

    def _choice(self, index: int, delta: TextDelta, finish_reason: FinishReason | None) -> dict[str, Any]:
        return {
            "index": index,
            "text": delta.content,
            "logprobs": self._logprobs(index, delta),
            "finish_reason": finish_reason,
            **self.ids(delta),
        }

    def _prompt_once(self, index: int) -> dict[str, Any]:
        """The prompt's ids in a choice's first event."""
        if not self.frame.call.return_token_ids or index in self._opened:
            return {}
        self._opened.add(index)
        return {"prompt_token_ids": self.frame.prompt_ids[index // self.frame.n]}

    def _logprobs(self, index: int, delta: TextDelta) -> dict[str, Any] | None:
        count = self.frame.num_logprobs
        if count is None or not (delta.scores or delta.finish_reason):
            return None
        before = len(self._echoed[index // self.frame.n].text) if self._echoed is not None else 0
        return legacy_logprobs(
            self.frame.vocabulary,
            [s.token_id for s in delta.scores],
            [s.scores for s in delta.scores],
            [before + s.offset for s in delta.scores],
            count,
        )


def chat_logprob(vocabulary: Vocabulary, score: TokenScore, count: int) -> dict[str, Any]:
    """A token with its log-probability and the `count` likeliest ones, as chat completions and responses show it."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        raw = vocabulary.bytes_of(token_id)
        return {"token": raw.decode("utf-8", "replace"), "logprob": finite(logprob), "bytes": list(raw)}

    top = zip(score.scores.top_ids[:count], score.scores.top_logprobs, strict=False)
    return entry(score.token_id, score.scores.logprob) | {"top_logprobs": [entry(*best) for best in top]}


def joined(deltas: Sequence[TextDelta]) -> TextDelta:
    """All deltas of one choice as one."""
    first, last = deltas[0], deltas[-1]
    return TextDelta(
        content="".join(d.content for d in deltas),
        reasoning="".join(d.reasoning for d in deltas),
        tool_calls=[c for d in deltas for c in d.tool_calls],
        token_ids=[t for d in deltas for t in d.token_ids],
        scores=[s for d in deltas for s in d.scores],
        finish_reason=last.finish_reason,
        stop=last.stop,
        prompt_scores=first.prompt_scores,
        pooled=last.pooled,
    )


def _call(call: ToolCallDelta) -> dict[str, Any]:
    """OpenAI's tool call, or the part of one that has come."""
    if call.id is None:
        return {"function": {"arguments": call.arguments}}
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
