"""Answers of /v1/responses: the response object, and its events in the official order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from tpqwen.api.answers import Frame, Usage, chat_logprob
from tpqwen.api.blocks import Block, Blocks, Change, Kind, Step
from tpqwen.api.failures import Failure
from tpqwen.request import FinishReason
from tpqwen.text.pipeline import TextDelta, TokenScore

_json = msgspec.json.encode
_PREFIX = {Kind.REASONING: "rs", Kind.TEXT: "msg", Kind.CALL: "fc"}
_PART = {Kind.REASONING: "reasoning_text", Kind.TEXT: "output_text"}
# What a response repeats of its request, with the values that it had when it said nothing.
_REPEATED: dict[str, Any] = {
    "instructions": None,
    "max_output_tokens": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "tool_choice": "auto",
    "tools": [],
    "top_logprobs": 0,
    "truncation": "disabled",
    "user": None,
}


class ResponsesAnswer:
    """Implements answers.Answer. There is one choice."""

    def __init__(self, frame: Frame) -> None:
        self._frame = frame
        self._blocks = Blocks()
        self._number = 0  # of the next event
        self._finish: FinishReason | None = None

    def opening(self, index: int, first: TextDelta, usage: Usage) -> bytes:
        response = self._response("in_progress", [], None)
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def events(self, index: int, delta: TextDelta, usage: Usage | None) -> bytes:
        self._finish = delta.finish_reason
        return b"".join(self._changed(change) for change in self._blocks.feed(delta))

    def ending(self, usage: Usage) -> bytes:
        status = self._status
        return self._event(f"response.{status}", response=self._response(status, self._output("completed"), usage))

    def failed(self, failed: Failure) -> bytes:
        error = {"message": failed.message, "type": failed.type, "param": failed.param, "code": failed.code}
        return self._event("error", code=failed.code, message=failed.message, param=failed.param, error=error)

    def body(self, deltas: Sequence[TextDelta], usage: Usage) -> bytes:
        self.events(0, deltas[0], None)
        return _json(self._response(self._status, self._output("completed"), usage))

    @property
    def _status(self) -> str:
        return "incomplete" if self._finish is FinishReason.LENGTH else "completed"

    def _output(self, status: str) -> list[dict[str, Any]]:
        """All items. The last one is incomplete when the answer is."""
        items = [self._item(block, status) for block in self._blocks.all]
        if self._status == "incomplete":
            items[-1]["status"] = "incomplete"
        return items

    def _changed(self, change: Change) -> bytes:
        block = change.block
        if change.step is Step.ADD:
            return self._added(change)
        if change.step is Step.OPEN:
            out = self._event("response.output_item.added", output_index=block.index, item=self._item(block, None))
            return out if block.kind is Kind.CALL else out + self._part_event("added", block, "", [])
        if block.kind is Kind.CALL:
            out = self._of(block, "response.function_call_arguments.done", name=block.name, arguments=block.text)
        else:
            extra = {"logprobs": self._scores(block.scores)} if block.kind is Kind.TEXT else {}
            out = self._of(block, f"response.{_PART[block.kind]}.done", content_index=0, text=block.text, **extra)
            out += self._part_event("done", block, block.text, block.scores)
        return out + self._event(
            "response.output_item.done", output_index=block.index, item=self._item(block, "completed")
        )

    def _added(self, change: Change) -> bytes:
        block = change.block
        if block.kind is Kind.CALL:
            return self._of(block, "response.function_call_arguments.delta", delta=change.text)
        extra = {"logprobs": self._scores(change.scores)} if block.kind is Kind.TEXT else {}
        return self._of(block, f"response.{_PART[block.kind]}.delta", content_index=0, delta=change.text, **extra)

    def _part_event(self, what: str, block: Block, text: str, scores: Sequence[TokenScore]) -> bytes:
        part = self._part(block.kind, text, scores)
        return self._of(block, f"response.content_part.{what}", content_index=0, part=part)

    def _of(self, block: Block, event: str, /, **fields: Any) -> bytes:
        return self._event(event, item_id=self._id(block), output_index=block.index, **fields)

    def _event(self, event: str, /, **fields: Any) -> bytes:
        data = {"type": event, "sequence_number": self._number, **fields}
        self._number += 1
        return b"event: " + event.encode() + b"\ndata: " + _json(data) + b"\n\n"

    def _id(self, block: Block) -> str:
        return f"{_PREFIX[block.kind]}_{self._frame.request_id}_{block.index}"

    def _item(self, block: Block, status: str | None) -> dict[str, Any]:
        """An output item; status None: it has just been begun."""
        head = {"id": self._id(block), "status": status or "in_progress"}
        if block.kind is Kind.CALL:
            call = {"call_id": block.call_id, "name": block.name, "arguments": block.text}
            return {**head, "type": "function_call", **call}
        content = [self._part(block.kind, block.text, block.scores)] if status else []
        if block.kind is Kind.REASONING:
            return {**head, "type": "reasoning", "summary": [], "content": content}
        return {**head, "type": "message", "role": "assistant", "content": content}

    def _part(self, kind: Kind, text: str, scores: Sequence[TokenScore]) -> dict[str, Any]:
        part: dict[str, Any] = {"type": _PART[kind], "text": text}
        return part if kind is Kind.REASONING else {**part, "annotations": [], "logprobs": self._scores(scores)}

    def _scores(self, scores: Sequence[TokenScore]) -> list[dict[str, Any]]:
        frame = self._frame
        if frame.num_logprobs is None:
            return []
        return [chat_logprob(frame.vocabulary, score, frame.num_logprobs) for score in scores]

    def _response(self, status: str, output: list[dict[str, Any]], usage: Usage | None) -> dict[str, Any]:
        frame, options = self._frame, self._frame.call.options
        reason = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": f"resp_{frame.request_id}",
            "object": "response",
            "created_at": frame.created,
            "status": status,
            "model": frame.info.name,
            "output": output,
            "error": None,
            "incomplete_details": reason,
            "usage": None if usage is None else _usage(usage),
            "temperature": frame.params.temperature,
            "top_p": frame.params.top_p,
            "reasoning": {"effort": options.get("reasoning", {}).get("effort"), "summary": None},
            "text": {"format": options.get("text", {}).get("format") or {"type": "text"}},
            "previous_response_id": None,
            "store": False,
            "background": False,
            "service_tier": "default",
            **{name: options.get(name, default) for name, default in _REPEATED.items()},
        }


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning},
        "total_tokens": usage.prompt + usage.completion,
    }
