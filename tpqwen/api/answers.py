"""OpenAI's answer bodies and stream events. A stream's usual event is one prepared prefix, the text, one suffix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from tpqwen.api.calls import Call
from tpqwen.api.info import ModelInfo
from tpqwen.request import FinishReason
from tpqwen.text.calls import ToolCallDelta, merged
from tpqwen.text.pipeline import TextDelta, TokenScore
from tpqwen.text.vocabulary import Vocabulary

_json = msgspec.json.encode
DONE = b"data: [DONE]\n\n"
COMMENT = b": waiting\n\n"
_LEAST_LOGPROB = -9999.0  # stands for minus infinity, which JSON does not have


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
    num_logprobs: int | None
    prompt_ids: list[list[int]]
    n: int


class Answer(Protocol):
    """Writes one kind of answer. Indexes are those of the choices."""

    def opening(self, index: int) -> bytes:
        """Event before a choice's first text; may be empty."""

    def events(self, index: int, delta: TextDelta, usage: Usage | None) -> bytes:
        """Events for a delta, several or none. usage: shown in each when given."""

    def usage_event(self, usage: Usage) -> bytes:
        """The event without choices that closes a stream with include_usage."""

    def body(self, deltas: Sequence[TextDelta], usage: Usage) -> bytes:
        """The whole answer from one complete delta for each choice."""


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

    def usage_event(self, usage: Usage) -> bytes:
        return self.event([], usage)

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

    def opening(self, index: int) -> bytes:
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
        return {"content": [self._token(score) for score in delta.scores], "refusal": None}

    def _token(self, score: TokenScore) -> dict[str, Any]:
        top = zip(score.scores.top_ids[: self.frame.num_logprobs], score.scores.top_logprobs, strict=False)
        best = [self._entry(token_id, logprob) for token_id, logprob in top]
        return self._entry(score.token_id, score.scores.logprob) | {"top_logprobs": best}

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        raw = self.frame.vocabulary.bytes_of(token_id)
        return {"token": raw.decode("utf-8", "replace"), "logprob": finite(logprob), "bytes": list(raw)}


class CompletionAnswer(_Writer):
    """/v1/completions."""

    prefix = "cmpl"
    kind = event_kind = "text_completion"

    def __init__(self, frame: Frame) -> None:
        super().__init__(frame)
        self._plain_tail = self._plain_tail[1:]  # no delta object to close
        self._opened: set[int] = set()

    def opening(self, index: int) -> bytes:
        return b""

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
        choices = [self._choice(i, d, d.finish_reason) | self._prompt_once(i) for i, d in enumerate(deltas)]
        return _json(self.envelope(self.kind, choices, usage))

    def _choice(self, index: int, delta: TextDelta, finish_reason: FinishReason | None) -> dict[str, Any]:
        return {
            "index": index,
            "text": delta.content,
            "logprobs": self._logprobs(delta),
            "finish_reason": finish_reason,
            **self.ids(delta),
        }

    def _prompt_once(self, index: int) -> dict[str, Any]:
        """The prompt's ids in a choice's first event."""
        if not self.frame.call.return_token_ids or index in self._opened:
            return {}
        self._opened.add(index)
        return {"prompt_token_ids": self.frame.prompt_ids[index // self.frame.n]}

    def _logprobs(self, delta: TextDelta) -> dict[str, Any] | None:
        count = self.frame.num_logprobs
        if count is None or not (delta.scores or delta.finish_reason):
            return None
        tops = []
        for score in delta.scores:
            top = zip(score.scores.top_ids[:count], score.scores.top_logprobs, strict=False)
            tops.append({self._name(i): finite(p) for i, p in [*top, (score.token_id, score.scores.logprob)]})
        return {
            "tokens": [self._name(s.token_id) for s in delta.scores],
            "token_logprobs": [finite(s.scores.logprob) for s in delta.scores],
            "top_logprobs": tops,
            "text_offset": [s.offset for s in delta.scores],
        }

    def _name(self, token_id: int) -> str:
        """A token as text, or as its bytes when it is no whole character: different tokens have different names."""
        raw = self.frame.vocabulary.bytes_of(token_id)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{b:02x}" for b in raw)


def joined(deltas: Sequence[TextDelta]) -> TextDelta:
    """All deltas of one choice as one."""
    last = deltas[-1]
    return TextDelta(
        content="".join(d.content for d in deltas),
        reasoning="".join(d.reasoning for d in deltas),
        tool_calls=[c for d in deltas for c in d.tool_calls],
        token_ids=[t for d in deltas for t in d.token_ids],
        scores=[s for d in deltas for s in d.scores],
        finish_reason=last.finish_reason,
        stop=last.stop,
    )


def _call(call: ToolCallDelta) -> dict[str, Any]:
    """OpenAI's tool call, or the part of one that has come."""
    if call.id is None:
        return {"function": {"arguments": call.arguments}}
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def finite(logprob: float) -> float:
    """A log-probability that JSON can hold."""
    return max(logprob, _LEAST_LOGPROB) if math.isfinite(logprob) else _LEAST_LOGPROB
