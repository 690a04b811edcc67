"""response_format and structured_outputs: their shapes, and the structure that they ask for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from tpqwen import structure
from tpqwen.api.shapes import Boolean, Items, OneOf, Only, Record, Schema, Text, clipped, refuse
from tpqwen.api.tool_shapes import JsonSchema
from tpqwen.errors import RequestError
from tpqwen.text.patterns import checked_regex
from tpqwen.text.schema import MAX_CHARACTERS, checked_schema
from tpqwen.text.structures import ANY_OBJECT

MAX_CHOICES = 256

_JSON_SCHEMA = Record(
    (("name", Text(1, 64)), ("description", Text()), ("schema", JsonSchema()), ("strict", Boolean())),
    required=("name", "schema"),
)
_TYPES = ("text", "json_object", "json_schema")
_FORMAT = Record((("type", OneOf(_TYPES)), ("json_schema", _JSON_SCHEMA)), required=("type",))


@dataclass(frozen=True)
class ResponseFormat:
    """OpenAI's three types."""

    def check(self, value: Any, where: str) -> dict[str, Any]:
        checked = _FORMAT.check(value, where)
        if (checked["type"] == "json_schema") != ("json_schema" in checked):
            code = "missing_field" if checked["type"] == "json_schema" else "invalid_value"
            refuse(f"{where}.json_schema", f"goes with type json_schema, not {checked['type']}", code)
        return checked

    def schema(self) -> Schema:
        kind = {"type": Only(("json_schema",)).schema(), "json_schema": _JSON_SCHEMA.schema()}
        bound = {"type": "object", "properties": kind, "required": list(kind), "additionalProperties": False}
        return {"oneOf": [Record((("type", OneOf(_TYPES[:2])),), ("type",)).schema(), bound]}


@dataclass(frozen=True)
class SchemaOrText:
    """A JSON schema, or one as JSON text; afterwards the schema."""

    def check(self, value: Any, where: str) -> dict[str, Any]:
        if isinstance(value, str):
            try:
                value = json.loads(Text(1, MAX_CHARACTERS).check(value, where))
            except (ValueError, RecursionError):
                refuse(where, f"is not JSON: {clipped(value)}", "invalid_value")
        return JsonSchema().check(value, where)

    def schema(self) -> Schema:
        return {"oneOf": [{"type": "object"}, {"type": "string"}]}


_STRUCTURED = Record(
    (
        ("json", SchemaOrText()),
        ("regex", Text(1, MAX_CHARACTERS)),
        ("choice", Items(Text(1, 1024), MAX_CHOICES, min_items=1)),
        ("grammar", Text(1, MAX_CHARACTERS)),
    ),
    code="unsupported_parameter",
)


@dataclass(frozen=True)
class StructuredOutputs:
    """vLLM's field: one of its keys."""

    def check(self, value: Any, where: str) -> dict[str, Any]:
        checked = _STRUCTURED.check(value, where)
        if len(checked) != 1:
            names = ", ".join(name for name, _ in _STRUCTURED.keys)
            refuse(where, f"must have exactly one of {names}", "invalid_value")
        return checked

    def schema(self) -> Schema:
        return {**_STRUCTURED.schema(), "minProperties": 1, "maxProperties": 1}


@dataclass(frozen=True)
class Answer:
    """The structure of the content, and the field that errors are about."""

    structure: structure.Structure
    param: str


def answer_of(values: dict[str, Any]) -> Answer | None:
    """What the checked fields bind the content to. Raises RequestError."""
    kind = values.get("response_format", {"type": "text"})
    structured = values.get("structured_outputs")
    if structured is None:
        if kind["type"] == "text":
            return None
        if kind["type"] == "json_object":
            return Answer(ANY_OBJECT, "response_format")
        where = "response_format.json_schema.schema"
        return Answer(structure.Schema(checked_schema(kind["json_schema"]["schema"], where)), where)
    if kind["type"] != "text":
        message = "response_format and structured_outputs are not given together"
        raise RequestError(message, param="structured_outputs", code="invalid_value")
    ((name, value),) = structured.items()
    where = f"structured_outputs.{name}"
    if name == "json":
        return Answer(structure.Schema(checked_schema(value, where)), where)
    if name == "regex":
        return Answer(structure.Regex(checked_regex(value, where)), where)
    if name == "choice":
        return Answer(structure.Choice(tuple(map(structure.Literal, value))), where)
    return Answer(structure.Ebnf(value), where)
