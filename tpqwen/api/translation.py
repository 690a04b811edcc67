"""What the translations of Responses and Anthropic messages into chat messages have in common."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from tpqwen.api.calls import Call, read_chat
from tpqwen.api.info import ModelInfo
from tpqwen.api.shapes import clipped, refuse
from tpqwen.errors import RequestError

# Marks on a text part that ask for nothing here: annotations and scores of an answer that is sent back, and Anthropic's
# cache marks (every prompt's prefix is cached anyway).
_SILENT = {"annotations", "logprobs", "citations", "cache_control"}


def object_of(value: Any, where: str) -> dict[str, Any]:
    """The value, which must be an object."""
    if not isinstance(value, dict):
        refuse(where, f"must be an object, not {clipped(value)}", "invalid_type")
    return value


def string_of(value: Any, where: str) -> str:
    """The value, which must be a string."""
    if value is None:
        refuse(where, "is missing", "missing_field")
    if not isinstance(value, str):
        refuse(where, f"must be a string, not {clipped(value)}", "invalid_type")
    return value


def text_of(content: Any, where: str, kinds: Collection[str]) -> str:
    """A string, or a list of parts of these types, joined. Raises RequestError naming the part."""
    if isinstance(content, str):
        return content
    if content is None:
        refuse(where, "is missing", "missing_field")
    if not isinstance(content, list):
        refuse(where, f"must be a string or a list, not {clipped(content)}", "invalid_type")
    return "".join(part_of(part, f"{where}[{i}]", kinds) for i, part in enumerate(content))


def part_of(part: Any, where: str, kinds: Collection[str]) -> str:
    """The text of one part."""
    part = object_of(part, where)
    if part.get("type") not in kinds:
        refuse(where, f"is of type {clipped(part.get('type'))}; this model reads text only", "unsupported_content")
    for key in part.keys() - {"type", "text"} - _SILENT:
        refuse(f"{where}.{key[:64]}", "is not known here", "unknown_parameter")
    return string_of(part.get("text"), f"{where}.text")


class Assistant:
    """An assistant's turn that is put together of several items; it goes into `messages` when it ends."""

    def __init__(self, messages: list[dict[str, Any]]) -> None:
        self._messages = messages
        self._turn: dict[str, Any] = {}

    def think(self, text: str) -> None:
        """Reasoning begins a turn."""
        self.end()
        self._turn = {"role": "assistant", "content": "", "reasoning_content": text}

    def say(self, text: str) -> None:
        """Content; after other content or calls it begins a turn."""
        if self._turn.get("content") or self._turn.get("tool_calls"):
            self.end()
        self._turn = {"role": "assistant", **self._turn, "content": text}

    def call(self, call_id: str, name: str, arguments: Any) -> None:
        """A tool call; arguments: JSON as text, or an object."""
        if not self._turn:
            self._turn = {"role": "assistant", "content": ""}
        function = {"name": name, "arguments": arguments}
        self._turn.setdefault("tool_calls", []).append({"id": call_id, "type": "function", "function": function})

    def end(self) -> None:
        """The turn is complete."""
        if self._turn:
            self._messages.append(self._turn)
            self._turn = {}


def translated(chat: dict[str, Any], info: ModelInfo, names: Mapping[str, str], options: Mapping[str, Any]) -> Call:
    """The chat call of a translated body. names: what the client calls the fields that errors of it name."""
    with client_names(names):
        return replace(read_chat(chat, info), param=names.get("messages", "messages"), names=names, options=options)


@contextmanager
def client_names(names: Mapping[str, str]) -> Iterator[None]:
    """A RequestError that is raised inside names its field as the client does; longest prefix first."""
    try:
        yield
    except RequestError as error:
        param = error.param or ""
        for known in sorted(names, key=len, reverse=True):
            if param == known or param.startswith((known + ".", known + "[")):
                error.param = names[known] + param[len(known) :]
                break
        raise
