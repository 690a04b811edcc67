"""Strict types of JSON values: each shape checks a value and describes itself as JSON schema.

Nothing is converted: "5" is no 5, true is no integer, 1.0 is no integer, NaN is no number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

from tpqwen.errors import RequestError

Schema = dict[str, Any]
_AT_ONCE = 1 << 14


def refuse(where: str, message: str, code: str) -> NoReturn:
    """Raise the RequestError (400) that names the field."""
    raise RequestError(f"{where}: {message}", param=where, code=code)


def clipped(value: object) -> str:
    """A client's value for an error message: at most 64 characters of it."""
    text = repr(value)
    return text if len(text) <= 64 else text[:61] + "..."


class Shape(Protocol):
    """check returns the value to use, or raises RequestError naming `where`."""

    def check(self, value: Any, where: str) -> Any:
        """The checked value."""

    def schema(self) -> Schema:
        """The shape as JSON schema."""


@dataclass(frozen=True)
class Integer:
    low: int
    high: int | None = None

    def check(self, value: Any, where: str) -> int:
        if type(value) is not int:
            refuse(where, f"must be an integer, not {clipped(value)}", "invalid_type")
        if value < self.low or (self.high is not None and value > self.high):
            limits = f"at least {self.low}" if self.high is None else f"in {self.low}..{self.high}"
            refuse(where, f"must be {limits}", "out_of_range")
        return int(value)

    def schema(self) -> Schema:
        high = {} if self.high is None else {"maximum": self.high}
        return {"type": "integer", "minimum": self.low, **high}


@dataclass(frozen=True)
class Number:
    """low <= value <= high, or low < value with open_low."""

    low: float
    high: float
    open_low: bool = False

    def check(self, value: Any, where: str) -> float:
        if type(value) not in (int, float):
            refuse(where, f"must be a number, not {clipped(value)}", "invalid_type")
        low_ok = value > self.low if self.open_low else value >= self.low
        if not (low_ok and value <= self.high) or not math.isfinite(value):
            refuse(
                where,
                f"must be {'above' if self.open_low else 'at least'} {self.low} and at most {self.high}",
                "out_of_range",
            )
        return float(value)

    def schema(self) -> Schema:
        low = {"exclusiveMinimum" if self.open_low else "minimum": self.low}
        return {"type": "number", **low, "maximum": self.high}


@dataclass(frozen=True)
class Boolean:
    def check(self, value: Any, where: str) -> bool:
        if type(value) is not bool:
            refuse(where, f"must be true or false, not {clipped(value)}", "invalid_type")
        return bool(value)

    def schema(self) -> Schema:
        return {"type": "boolean"}


@dataclass(frozen=True)
class Text:
    min_length: int = 0
    max_length: int | None = None

    def check(self, value: Any, where: str) -> str:
        if not isinstance(value, str):
            refuse(where, f"must be a string, not {clipped(value)}", "invalid_type")
        if len(value) < self.min_length:
            refuse(where, "must not be empty", "invalid_value")
        if self.max_length is not None and len(value) > self.max_length:
            refuse(where, f"must have at most {self.max_length} characters, not {len(value)}", "invalid_value")
        return value

    def schema(self) -> Schema:
        high = {} if self.max_length is None else {"maxLength": self.max_length}
        return {"type": "string", **({"minLength": self.min_length} if self.min_length else {}), **high}


@dataclass(frozen=True)
class Only:
    """The few values that this server does of all those that OpenAI defines."""

    values: tuple[Any, ...]
    code: str = "unsupported_value"

    def check(self, value: Any, where: str) -> Any:
        if type(value) is not type(self.values[0]):
            refuse(where, f"must be {type(self.values[0]).__name__}, not {clipped(value)}", "invalid_type")
        if value not in self.values:
            known = ", ".join(map(repr, self.values))
            refuse(where, f"{clipped(value)} is not supported here; only {known}", self.code)
        return value

    def schema(self) -> Schema:
        return {"enum": list(self.values)}


@dataclass(frozen=True)
class OneOf:
    """One of a few words."""

    words: tuple[str, ...]

    def check(self, value: Any, where: str) -> str:
        if Text().check(value, where) not in self.words:
            refuse(where, f"must be one of {', '.join(self.words)}, not {clipped(value)}", "invalid_value")
        return str(value)

    def schema(self) -> Schema:
        return {"enum": list(self.words)}


@dataclass(frozen=True)
class Either:
    """A string, or the other shape."""

    other: Shape

    def check(self, value: Any, where: str) -> Any:
        return value if isinstance(value, str) else self.other.check(value, where)

    def schema(self) -> Schema:
        return {"anyOf": [{"type": "string"}, self.other.schema()]}


@dataclass(frozen=True)
class Objects:
    """A list of objects that are checked where they are translated. kinds: what their `type` may be."""

    max_items: int
    kinds: tuple[str, ...] = ()
    min_items: int = 0

    def check(self, value: Any, where: str) -> list[Any]:
        if not isinstance(value, list):
            refuse(where, f"must be a list, not {clipped(value)}", "invalid_type")
        if len(value) > self.max_items:
            refuse(where, f"must have at most {self.max_items} entries, not {len(value)}", "too_many_items")
        if len(value) < self.min_items:
            refuse(where, "must not be empty", "invalid_value")
        return value

    def schema(self) -> Schema:
        kinds = {"properties": {"type": {"enum": list(self.kinds)}}} if self.kinds else {}
        low = {"minItems": self.min_items} if self.min_items else {}
        return {"type": "array", "items": {"type": "object", **kinds}, **low, "maxItems": self.max_items}


@dataclass(frozen=True)
class AnyObject:
    """An object that is checked where it is used."""

    def check(self, value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            refuse(where, f"must be an object, not {clipped(value)}", "invalid_type")
        return value

    def schema(self) -> Schema:
        return {"type": "object"}


@dataclass(frozen=True)
class Items:
    """A list of one shape."""

    item: Shape
    max_items: int
    min_items: int = 0

    def check(self, value: Any, where: str) -> list[Any]:
        if not isinstance(value, list):
            refuse(where, f"must be a list, not {clipped(value)}", "invalid_type")
        if len(value) > self.max_items:
            refuse(where, f"must have at most {self.max_items} entries, not {len(value)}", "too_many_items")
        if len(value) < self.min_items:
            refuse(where, "must not be empty", "invalid_value")
        return [self.item.check(v, f"{where}[{i}]") for i, v in enumerate(value)]

    def schema(self) -> Schema:
        low = {"minItems": self.min_items} if self.min_items else {}
        return {"type": "array", "items": self.item.schema(), **low, "maxItems": self.max_items}


@dataclass(frozen=True)
class OneOrMany:
    """One value, or a list of them; always a list afterwards."""

    many: Items

    def check(self, value: Any, where: str) -> list[Any]:
        if isinstance(value, list):
            return self.many.check(value, where)
        return [self.many.item.check(value, where)]

    def schema(self) -> Schema:
        return {"oneOf": [self.many.item.schema(), self.many.schema()]}


@dataclass(frozen=True)
class Mapping:
    """An object with free keys and values of one shape."""

    value: Shape
    max_items: int
    max_key_length: int = 64

    def check(self, value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            refuse(where, f"must be an object, not {clipped(value)}", "invalid_type")
        if len(value) > self.max_items:
            refuse(where, f"must have at most {self.max_items} entries, not {len(value)}", "too_many_items")
        for key in value:
            if len(key) > self.max_key_length:
                refuse(where, f"keys must have at most {self.max_key_length} characters", "invalid_value")
        return {k: self.value.check(v, f"{where}.{k}") for k, v in value.items()}

    def schema(self) -> Schema:
        return {"type": "object", "additionalProperties": self.value.schema(), "maxProperties": self.max_items}


@dataclass(frozen=True)
class TokenBias:
    """Token id (a string of digits, as JSON has no other keys) -> bias."""

    value: Number
    max_items: int

    def check(self, value: Any, where: str) -> dict[int, float]:
        checked = Mapping(self.value, self.max_items).check(value, where)
        for key in checked:
            if not (key.isascii() and key.isdigit() and len(key) <= 9):
                refuse(f"{where}.{key}", "keys must be token ids", "invalid_value")
        return {int(k): v for k, v in checked.items()}

    def schema(self) -> Schema:
        return Mapping(self.value, self.max_items).schema()


@dataclass(frozen=True)
class Record:
    """An object whose keys are known; null counts as absent. Keys that are not are refused with `code`."""

    keys: tuple[tuple[str, Shape], ...]
    required: tuple[str, ...] = ()
    code: str = "unknown_parameter"

    def check(self, value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            refuse(where, f"must be an object, not {clipped(value)}", "invalid_type")
        shapes = dict(self.keys)
        for key in value:
            if key not in shapes:
                refuse(f"{where}.{key[:64]}", f"not known here; only {', '.join(shapes)}", self.code)
        for key in self.required:
            if value.get(key) is None:
                refuse(f"{where}.{key}", "is missing", "missing_field")
        return {k: shapes[k].check(v, f"{where}.{k}") for k, v in value.items() if v is not None}

    def schema(self) -> Schema:
        properties = {k: s.schema() for k, s in self.keys}
        return {
            "type": "object",
            "properties": properties,
            "required": list(self.required),
            "additionalProperties": False,
        }


@dataclass(frozen=True)
class Prompts:
    """A string, a list of strings, a list of token ids or a list of those; afterwards a list of str | list[int]."""

    max_prompts: int

    def check(self, value: Any, where: str) -> list[str | list[int]]:
        if isinstance(value, str):
            return [value]
        if not isinstance(value, list):
            refuse(where, f"must be a string or a list, not {clipped(value)}", "invalid_type")
        if not value:
            refuse(where, "must not be empty", "invalid_value")
        if not isinstance(value[0], str | list):
            return [_token_ids(value, where)]
        if len(value) > self.max_prompts:
            refuse(where, f"must have at most {self.max_prompts} prompts, not {len(value)}", "too_many_items")
        kind = type(value[0])
        if any(type(prompt) is not kind for prompt in value):
            refuse(where, "must hold strings only or lists of token ids only", "invalid_value")
        return value if kind is str else [_token_ids(ids, f"{where}[{i}]") for i, ids in enumerate(value)]

    def schema(self) -> Schema:
        token_id = {"type": "integer", "minimum": 0, "maximum": (1 << 31) - 1}
        ids = {"type": "array", "items": token_id, "minItems": 1}
        many = {"minItems": 1, "maxItems": self.max_prompts}
        texts = {"type": "array", "items": {"type": "string"}, **many}
        return {"oneOf": [{"type": "string"}, texts, ids, {"type": "array", "items": ids, **many}]}


def _token_ids(value: Sequence[Any], where: str) -> list[int]:
    """Checked by passes over long slices: a prompt may hold a million ids, and no other thread runs within a pass."""
    if not value:
        refuse(where, "must not be empty", "invalid_value")
    for start in range(0, len(value), _AT_ONCE):
        some = value[start : start + _AT_ONCE]
        if set(map(type, some)) != {int} or min(some) < 0 or max(some) >= 1 << 31:
            refuse(where, "token ids must be integers of at least 0, below 2**31", "invalid_value")
    return list(value)


@dataclass(frozen=True)
class Messages:
    """Chat messages; only their outer shape is checked here, the rest where they are rendered (text.messages)."""

    max_items: int

    def check(self, value: Any, where: str) -> list[Any]:
        if not isinstance(value, list):
            refuse(where, f"must be a list, not {clipped(value)}", "invalid_type")
        return value

    def schema(self) -> Schema:
        role = {"enum": ["system", "developer", "user", "assistant", "tool"]}
        part = {
            "type": "object",
            "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
            "required": ["type", "text"],
            "additionalProperties": False,
        }
        content = {"anyOf": [{"type": ["string", "null"]}, {"type": "array", "items": part}]}
        message = {"type": "object", "properties": {"role": role, "content": content}, "required": ["role"]}
        return {"type": "array", "items": message, "minItems": 1, "maxItems": self.max_items}
