"""Qwen3's JSON form of a tool call, read as it streams: `{"name": NAME, "arguments": {...}}` between the marks."""

from __future__ import annotations

import json
import re

import msgspec

from tpqwen.text.call_pieces import CallPiece

MAX_HEAD = 4096  # characters in which a call must name its function to be streamed
MAX_DEPTH = 256
_STRING = r'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_HEAD = re.compile(rf'\s*\{{\s*"name"\s*:\s*({_STRING})\s*,\s*"arguments"\s*:\s*(?=\{{)', re.DOTALL)
_FLAT = re.compile(rf'(?:[^"{{}}\[\]]++|{_STRING}|\[\s*+\]|\{{\s*+\}})*+', re.DOTALL)  # whole strings, empty brackets
_STRING_END = re.compile(r'[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)


class HermesCall:
    """One call. Streams its arguments once the name and the opening brace have been seen in the usual order; any other
    order is read when the call is complete. Linear time, whatever the text.
    """

    def __init__(self) -> None:
        self.committed = False
        self._head: list[str] = []
        self._head_length = 0
        self._span = JsonSpan()

    def feed(self, text: str) -> CallPiece | None:
        """Take more of the call's text. The first piece that is returned has the name and commits the call."""
        if self.committed:
            return CallPiece(None, self._span.take(text)) if not self._span.ended else None
        self._head.append(text)
        self._head_length += len(text)
        if self._head_length > MAX_HEAD:
            return None
        head = "".join(self._head)
        match = _HEAD.match(head)
        name = _name(match.group(1)) if match else None
        if match is None or name is None:
            return None
        self.committed = True
        return CallPiece(name, self._span.take(head[match.end() :]))

    def close(self) -> CallPiece | None:
        """The call is over. What is still to be told, or None; a call that is not committed now is no call."""
        if self.committed:
            return None
        try:
            call = _decode("".join(self._head))
        except (msgspec.DecodeError, RecursionError):
            return None
        arguments = bytes(call.arguments).decode()
        if not call.name or not arguments.startswith("{"):
            return None
        self.committed = True
        return CallPiece(call.name, arguments)


class _Call(msgspec.Struct):
    """A complete call. The arguments are checked to be JSON and kept as they are written."""

    name: str
    arguments: msgspec.Raw = msgspec.Raw(b"{}")


_decode = msgspec.json.Decoder(_Call).decode


class JsonSpan:
    """Finds the end of one JSON object in streamed text by its strings and brackets. What is inside is not judged."""

    def __init__(self) -> None:
        self.ended = False
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def take(self, text: str) -> str:
        """The part of text that belongs to the value. After its end nothing does; too deep, everything does."""
        at = self._after_string(text) if self._in_string else 0
        while at < len(text) and self._depth <= MAX_DEPTH:
            at = _FLAT.match(text, at).end() + 1  # type: ignore[union-attr]  # it matches the empty string too
            char = text[at - 1 : at]
            if char == '"':
                self._in_string = True
                at = self._after_string(text, at)
            elif char in ("{", "["):
                self._depth += 1
            elif char:
                self._depth -= 1
                if self._depth <= 0:
                    self.ended = True
                    return text[:at]
        return text

    def _after_string(self, text: str, start: int = 0) -> int:
        """Where the open string ends, or the text."""
        if self._escaped and start < len(text):
            self._escaped = False
            start += 1
        match = _STRING_END.match(text, start)
        if match is not None:
            self._in_string = False
            return match.end()
        rest = text[start:]
        self._escaped = (len(rest) - len(rest.rstrip("\\"))) % 2 == 1
        return len(text)


def _name(literal: str) -> str | None:
    try:
        name = json.loads(literal)
    except ValueError:
        return None
    return name if isinstance(name, str) and name else None
