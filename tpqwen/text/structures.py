"""What a request says about the form of its output, as structures to compile."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from tpqwen.errors import RequestError
from tpqwen.structure import Choice, Literal, Schema, Sequence, Structure, Without
from tpqwen.text.coder_xml import ENDS, types_of
from tpqwen.text.json_types import listed, target
from tpqwen.text.schema import checked_schema
from tpqwen.text.tools import CallFormat, Tools
from tpqwen.text.tools import Choice as ToolChoice

ANY_OBJECT = Schema('{"type": "object"}')
_SAFE_KEY = re.compile(r"[^<>\s][^<>\n]*[^<>\s]|[^<>\s]")


def call_structure(asked: Tools, form: CallFormat) -> Structure | None:
    """The body of a call; None when nothing binds it: the choice is auto and no function is strict.

    A call that the request demands has a declared name and arguments under that function's schema; under auto the same
    holds for strict functions, and for the others only their name and form. Raises RequestError naming the schema.
    """
    must = asked.choice in (ToolChoice.REQUIRED, ToolChoice.NAMED)
    functions = {
        f"tools[{i}].function.parameters": d["function"]
        for i, d in enumerate(asked.definitions)
        if asked.choice is not ToolChoice.NAMED or d["function"]["name"] == asked.name
    }
    if not must and not any(f.get("strict") for f in functions.values()):
        return None
    write = _xml_call if form is CallFormat.XML else _json_call
    return Choice(tuple(write(f, where, must or bool(f.get("strict"))) for where, f in functions.items()))


def _json_call(function: Mapping[str, Any], where: str, bound: bool) -> Structure:
    head = f'\n{{"name": {json.dumps(function["name"], ensure_ascii=False)}, "arguments": '
    return Sequence((Literal(head), _arguments(function, where, bound), Literal("}\n")))


def _arguments(function: Mapping[str, Any], where: str, bound: bool) -> Structure:
    parameters = function.get("parameters")
    return Schema(_object_schema(parameters, where)) if bound and parameters else ANY_OBJECT


def _object_schema(parameters: Mapping[str, Any], where: str) -> str:
    """Arguments are an object, also where the schema forgets to say so."""
    return checked_schema(parameters if "type" in parameters else {"type": "object", **parameters}, where)


def _xml_call(function: Mapping[str, Any], where: str, bound: bool) -> Structure:
    head, tail = Literal(f"\n<function={function['name']}>\n"), Literal("</function>\n")
    parameters = function.get("parameters") or {}
    if not (bound and parameters):
        return Sequence((head, Without(("</function>",)), tail))
    _object_schema(parameters, where)
    required = listed(parameters, "required")
    properties = parameters.get("properties") or {}
    parts = [_parameter(parameters, key, f"{where}.properties.{key}", key in required) for key in properties]
    return Sequence((head, *parts, tail))


def _parameter(parameters: Mapping[str, Any], key: str, where: str, required: bool) -> Structure:
    if not _SAFE_KEY.fullmatch(key):
        raise RequestError(f"{where}: this name cannot stand in a call", param=where, code="unsupported_schema")
    value = _value(parameters, key, where)
    written = Sequence((Literal(f"<parameter={key}>\n"), value, Literal("\n</parameter>\n")))
    return written if required else Choice((written, Literal("")))


def _value(parameters: Mapping[str, Any], key: str, where: str) -> Structure:
    """A string stands as it is, anything else as JSON; of a string only enum and const can be enforced."""
    schema = parameters["properties"][key]
    types = types_of(parameters, key)
    if "string" not in types:
        definitions = {word: parameters[word] for word in ("$defs", "definitions") if word in parameters}
        return Schema(json.dumps({**definitions, **schema}, ensure_ascii=False))
    while isinstance(schema, Mapping) and "$ref" in schema:
        schema = target(parameters, schema["$ref"])
    schema = schema if isinstance(schema, Mapping) else {}
    named = [schema["const"]] if "const" in schema else listed(schema, "enum")
    if named:
        return Choice(tuple(Literal(v if isinstance(v, str) else json.dumps(v)) for v in named))
    for word in ("minLength", "maxLength", "format", "pattern"):
        if word in schema:
            message = f"{where}.{word}: cannot be enforced in this model's calls"
            raise RequestError(message, param=f"{where}.{word}", code="unsupported_schema")
    return Without(ENDS)
