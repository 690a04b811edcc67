"""What a request says about the form of its output, as structures to compile."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from tpqwen.errors import RequestError
from tpqwen.structure import Choice, Literal, Schema, Sequence, Structure, Without
from tpqwen.text.coder_xml import ENDS, types_of
from tpqwen.text.json_types import listed, resolved
from tpqwen.text.schema import NOTES, checked_schema
from tpqwen.text.tools import CallFormat, Tools
from tpqwen.text.tools import Choice as ToolChoice

ANY_OBJECT = Schema('{"type": "object"}')
_SAFE_KEY = re.compile(r"[^<>\s][^<>\n]*[^<>\s]|[^<>\s]")


def call_structure(asked: Tools, form: CallFormat) -> Structure | None:
    """The body of a call; None when nothing binds it: the choice is auto and no function is strict.

    Every call has a declared name and a JSON object of arguments. Those of a strict function keep to its schema, or
    RequestError names what of it can't be enforced; those of the others do where the request demands calls and their
    schema can be enforced.
    """
    must = asked.choice in (ToolChoice.REQUIRED, ToolChoice.NAMED)
    functions = {
        f"tools[{i}].function.parameters": d["function"]
        for i, d in enumerate(asked.definitions)
        if asked.choice is not ToolChoice.NAMED or d["function"]["name"] == asked.name
    }
    if not must and not any(f.get("strict") for f in functions.values()):
        return None
    return Choice(tuple(_call(f, where, form, must) for where, f in functions.items()))


def _call(function: Mapping[str, Any], where: str, form: CallFormat, must: bool) -> Structure:
    write = _xml_call if form is CallFormat.XML else _json_call
    parameters, strict = function.get("parameters"), bool(function.get("strict"))
    if parameters and (must or strict):
        # Arguments are an object, also where the schema forgets to say so.
        schema = parameters if "type" in parameters else {"type": "object", **parameters}
        try:
            return write(function["name"], schema, where)
        except RequestError:
            if strict:
                raise
    return write(function["name"], None, where)


def _json_call(name: str, parameters: Mapping[str, Any] | None, where: str) -> Structure:
    head = f'\n{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": '
    arguments = ANY_OBJECT if parameters is None else Schema(checked_schema(parameters, where))
    return Sequence((Literal(head), arguments, Literal("}\n")))


def _xml_call(name: str, parameters: Mapping[str, Any] | None, where: str) -> Structure:
    head, tail = Literal(f"\n<function={name}>\n"), Literal("</function>\n")
    if parameters is None:
        return Sequence((head, Without(("</function>",)), tail))
    checked_schema(parameters, where)
    for word in sorted(set(parameters) - NOTES - {"type", "properties", "required", "additionalProperties"}):
        _refuse(f"{where}.{word}")
    required = listed(parameters, "required")
    properties = parameters.get("properties") or {}
    parts = [_parameter(parameters, key, f"{where}.properties.{key}", key in required) for key in properties]
    return Sequence((head, *parts, tail))


def _parameter(parameters: Mapping[str, Any], key: str, where: str, required: bool) -> Structure:
    if not _SAFE_KEY.fullmatch(key):
        _refuse(where)
    value = _value(parameters, key, where)
    written = Sequence((Literal(f"<parameter={key}>\n"), value, Literal("\n</parameter>\n")))
    return written if required else Choice((written, Literal("")))


def _value(parameters: Mapping[str, Any], key: str, where: str) -> Structure:
    """A string stands as it is, anything else as JSON; of a string only enum and const can be enforced."""
    schema = parameters["properties"][key]
    types = types_of(parameters, key)
    if "string" not in types:
        definitions = {word: parameters[word] for word in ("$defs", "definitions") if word in parameters}
        return Schema(checked_schema({**definitions, **schema}, where))
    schema = resolved(schema, parameters)
    named = [schema["const"]] if "const" in schema else listed(schema, "enum")
    texts = [v if isinstance(v, str) else json.dumps(v) for v in named]
    if any(end in text for end in ENDS for text in texts):
        _refuse(where)
    if texts:
        return Choice(tuple(map(Literal, texts)))
    for word in ("minLength", "maxLength", "format", "pattern"):
        if word in schema:
            _refuse(f"{where}.{word}")
    return Without(ENDS)


def _refuse(where: str) -> NoReturn:
    raise RequestError(f"{where}: cannot be enforced in this model's calls", param=where, code="unsupported_schema")
