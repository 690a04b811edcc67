"""Answers of /v1/messages: Anthropic's message, its events in the official order, and its errors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import msgspec

from tpqwen.api.answers import Frame, Usage
from tpqwen.api.blocks import Block, Blocks, Change, Kind, Step
from tpqwen.api.failures import Failure
from tpqwen.request import FinishReason
from tpqwen.text.pipeline import TextDelta

_json = msgspec.json.encode
_ERRORS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class MessagesAnswer:
    """Implements answers.Answer. There is one choice."""

    def __init__(self, frame: Frame) -> None:
        self._frame = frame
        self._blocks = Blocks()
        self._last = TextDelta()

    def opening(self, index: int, first: TextDelta, usage: Usage) -> bytes:
        usage = Usage(usage.prompt, 0, usage.cached, 0)
        return _event("message_start", message=self._message([], None, None, usage))

    def events(self, index: int, delta: TextDelta, usage: Usage | None) -> bytes:
        self._last = delta
        return b"".join(_changed(change) for change in self._blocks.feed(delta))

    def ending(self, usage: Usage) -> bytes:
        reason, stop = self._why()
        delta = {"stop_reason": reason, "stop_sequence": stop}
        return _event("message_delta", delta=delta, usage=_usage(usage)) + _event("message_stop")

    def failed(self, failed: Failure) -> bytes:
        return b"event: error\ndata: " + error_body(failed) + b"\n\n"

    def body(self, deltas: Sequence[TextDelta], usage: Usage) -> bytes:
        self.events(0, deltas[0], None)
        content = [_block(block) for block in self._blocks.all]
        return _json(self._message(content, *self._why(), usage))

    def _why(self) -> tuple[str, str | None]:
        """stop_reason and stop_sequence."""
        last = self._last
        if last.finish_reason is FinishReason.LENGTH:
            return "max_tokens", None
        if any(block.kind is Kind.CALL for block in self._blocks.all):
            return "tool_use", None
        return ("stop_sequence", last.stop) if isinstance(last.stop, str) else ("end_turn", None)

    def _message(
        self, content: list[dict[str, Any]], reason: str | None, stop: str | None, usage: Usage
    ) -> dict[str, Any]:
        return {
            "id": f"msg_{self._frame.request_id}",
            "type": "message",
            "role": "assistant",
            "model": self._frame.info.name,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": stop,
            "usage": _usage(usage),
        }


def error_body(failed: Failure) -> bytes:
    """Anthropic's error body; its message names the field."""
    kind = _ERRORS.get(failed.status, "invalid_request_error" if failed.status < 500 else "api_error")
    text = failed.message
    if failed.param and failed.param not in text:
        text = f"{failed.param}: {text}"
    return _json({"type": "error", "error": {"type": kind, "message": text}})


def _changed(change: Change) -> bytes:
    block = change.block
    if change.step is Step.OPEN:
        return _event("content_block_start", index=block.index, content_block=_empty(block))
    if change.step is Step.CLOSE:
        signed = {"type": "signature_delta", "signature": ""}
        before = _event("content_block_delta", index=block.index, delta=signed) if block.kind is Kind.REASONING else b""
        return before + _event("content_block_stop", index=block.index)
    if not change.text:  # log-probabilities alone, which this API does not show
        return b""
    kinds = {
        Kind.REASONING: {"type": "thinking_delta", "thinking": change.text},
        Kind.TEXT: {"type": "text_delta", "text": change.text},
        Kind.CALL: {"type": "input_json_delta", "partial_json": change.text},
    }
    return _event("content_block_delta", index=block.index, delta=kinds[block.kind])


def _empty(block: Block) -> dict[str, Any]:
    if block.kind is Kind.REASONING:
        return {"type": "thinking", "thinking": "", "signature": ""}
    if block.kind is Kind.TEXT:
        return {"type": "text", "text": ""}
    return {"type": "tool_use", "id": block.call_id, "name": block.name, "input": {}}


def _block(block: Block) -> dict[str, Any]:
    whole = _empty(block)
    if block.kind is Kind.CALL:
        return whole | {"input": _arguments(block.text)}
    return whole | {"thinking" if block.kind is Kind.REASONING else "text": block.text}


def _arguments(text: str) -> dict[str, Any]:
    """A call's arguments as an object; what the model left unfinished or made no object is shown as it is."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {"_unparsed": text}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt - usage.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached,
        "output_tokens": usage.completion,
    }


def _event(name: str, **fields: Any) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + _json({"type": name, **fields}) + b"\n\n"
