"""Qwen3-Coder's form of a tool call, read as it streams and told as JSON.

    <function=NAME>
    <parameter=KEY>
    value, may span lines
    </parameter>
    </function>

Values are converted by the tool's JSON schema; text that does not convert stays a string.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from json.encoder import encode_basestring
from typing import Any

from tpqwen.text.call_pieces import CallPiece
from tpqwen.text.json_types import kinds_of, kinds_of_value

MAX_TAG = 4096  # characters of one opening tag
MAX_PARAMETERS = 1024  # of one call, which ends there
_FUNCTION = re.compile(r"\s*+<function=([^<>]*+)>")
_NEXT = re.compile(r"<(?:parameter=([^<>]*+)>|/function>)")
_VALUE_END = re.compile(r"<(/parameter>|(?=parameter=|/function>))")
ENDS = ("</parameter>", "<parameter=", "</function>")
_MAYBE_ENDS = frozenset(end[:i] for end in ENDS for i in range(1, len(end)))
_LONGEST = max(map(len, ENDS))
_STRING = frozenset({"string"})


class CoderCall:
    """One call. parameters: the JSON schemas of each function's arguments. A string is streamed as it comes, any other
    value when it is complete. A key given twice counts once, as first given. Linear time, whatever the text.
    """

    def __init__(self, parameters: Mapping[str, Mapping[str, Any]]) -> None:
        self.committed = False
        self._parameters = parameters
        self._schema: Mapping[str, Any] = {}
        self._rest = ""  # text that may still become a tag
        self._keys: set[str] = set()
        self._value: Value | None = None
        self._ended = False

    def feed(self, text: str) -> CallPiece | None:
        """Take more of the call's text. The first piece that is returned has the name and commits the call."""
        if len(text) <= MAX_TAG:
            return self._feed(text)
        pieces = [self._feed(text[i : i + MAX_TAG]) for i in range(0, len(text), MAX_TAG)]
        told = [p for p in pieces if p is not None]
        name = next((p.name for p in told if p.name is not None), None)
        return CallPiece(name, "".join(p.arguments for p in told)) if told else None

    def close(self) -> CallPiece | None:
        """The call is over: what was left open is closed."""
        if not self.committed or self._ended:
            return None
        self._ended = True
        return CallPiece(None, self._finish_value(self._rest) + "}")

    def _feed(self, text: str) -> CallPiece | None:
        if self._ended:
            return None
        self._rest += text
        name = None
        if not self.committed:
            name = self._read_name()
            if name is None:
                return None
        out = ["{"] if name is not None else []
        while not self._ended and self._read_more(out):
            pass
        text = "".join(out)
        return CallPiece(name, text) if text else None

    def _read_name(self) -> str | None:
        match = _FUNCTION.match(self._rest)
        name = match.group(1).strip() if match else ""
        if match is None or not name:
            self._ended = len(self._rest) > MAX_TAG
            return None
        self.committed = True
        self._rest = self._rest[match.end() :]
        self._schema = self._parameters.get(name, {})
        return name

    def _read_more(self, out: list[str]) -> bool:
        """Add the next bit of JSON; False when more text is needed."""
        return self._read_tag(out) if self._value is None else self._read_value(self._value, out)

    def _read_tag(self, out: list[str]) -> bool:
        match = _NEXT.search(self._rest)
        if match is None:
            at = self._rest.rfind("<")
            self._rest = self._rest[at:] if at >= 0 else ""
            if len(self._rest) > MAX_TAG:
                self._end(out)
            return False
        self._rest = self._rest[match.end() :]
        key = match.group(1)
        if key is None or len(self._keys) == MAX_PARAMETERS:
            self._end(out)
        elif key.strip() in self._keys:
            self._value = Value(_STRING, silent=True)
        else:
            self._begin(key.strip(), out)
        return True

    def _begin(self, key: str, out: list[str]) -> None:
        out.append((", " if self._keys else "") + encode_basestring(key) + ": ")
        self._keys.add(key)
        self._value = Value(types_of(self._schema, key))

    def _end(self, out: list[str]) -> None:
        self._ended = True
        out.append("}")

    def _read_value(self, value: Value, out: list[str]) -> bool:
        match = _VALUE_END.search(self._rest)
        if match is None:
            cut = _certain(self._rest)
            out.append(value.feed(self._rest[:cut]))
            self._rest = self._rest[cut:]
            return False
        text = self._rest[: match.start()]
        self._rest = self._rest[match.end() if match.group(1) else match.start() :]
        out.append(self._finish_value(text))
        return True

    def _finish_value(self, text: str) -> str:
        value, self._value = self._value, None
        if value is None:
            return ""
        return value.feed(text.removesuffix("\n")) + value.close()


class Value:
    """One parameter's value. types: what its schema allows. silent: it is read but not told."""

    def __init__(self, types: frozenset[str], silent: bool = False) -> None:
        self._types = types
        self._silent = silent
        self._streams = types == _STRING
        self._begun = False
        self._parts: list[str] = []

    def feed(self, text: str) -> str:
        """JSON that is certain after this text."""
        if not text or self._silent:
            return ""
        opening = ""
        if not self._begun:
            self._begun = True
            text = text.removeprefix("\n")
            opening = '"'
        if self._streams:
            return opening + encode_basestring(text)[1:-1]
        self._parts.append(text)
        return ""

    def close(self) -> str:
        """The rest of its JSON."""
        if self._silent:
            return ""
        if self._streams:
            return '"' if self._begun else '""'
        return json.dumps(converted("".join(self._parts), self._types), ensure_ascii=False)


def _certain(text: str) -> int:
    """How much of a value's text can neither begin its end nor be the newline before it."""
    at = text.rfind("<", max(0, len(text) - _LONGEST))
    cut = at if at >= 0 and text[at:] in _MAYBE_ENDS else len(text)
    return cut - 1 if cut and text[cut - 1] == "\n" else cut


def converted(text: str, types: frozenset[str]) -> Any:
    """The value that text stands for under the first of the types that it fits; else the text itself."""
    if "null" in types and text.strip() == "null":
        return None
    if "boolean" in types and text.strip().lower() in ("true", "false"):
        return text.strip().lower() == "true"
    if not types & {"integer", "number", "object", "array"}:
        return text
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return text
    return value if kinds_of_value(value) & types and _is_finite(value) else text


def types_of(parameters: Mapping[str, Any], key: str) -> frozenset[str]:
    """JSON types that the schema of the arguments allows for one key; only string where it does not say."""
    properties = parameters.get("properties")
    schema = properties.get(key) if isinstance(properties, Mapping) else None
    return kinds_of(schema, parameters) or _STRING


def _is_finite(value: object) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
