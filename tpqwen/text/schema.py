"""Which JSON schemas can be enforced exactly: what the compiled grammar would overlook is refused, by path."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any, NoReturn

from tpqwen.errors import RequestError
from tpqwen.text.json_types import kinds_of, kinds_of_value, listed, resolved, target
from tpqwen.text.patterns import check_json_pattern

MAX_CHARACTERS = 64 * 1024
MAX_DEPTH = 32
MAX_STRING = 32  # characters that minLength and maxLength may name: longer ones take seconds to compile
NOTES = frozenset(
    {
        *("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"),
        *("$schema", "$id", "$comment", "$defs", "definitions", "strict"),
    }
)
_TYPES = frozenset({"string", "integer", "number", "boolean", "null", "object", "array"})
_STRING = frozenset({"minLength", "maxLength", "pattern", "format"})
_NUMBER = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"})
_ARRAY = frozenset({"items", "prefixItems", "minItems", "maxItems", "uniqueItems"})
_OBJECT = frozenset(
    {
        *("properties", "required", "additionalProperties", "patternProperties", "propertyNames"),
        *("minProperties", "maxProperties"),
    }
)
_COUNTS = frozenset({"minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"})
# Words under which schemas stand: one, a list of them, or by name.
_ONE = frozenset({"items", "additionalProperties", "propertyNames"})
_LISTS = frozenset({"anyOf", "oneOf", "allOf", "prefixItems"})
_MAPS = frozenset({"properties", "patternProperties", "$defs", "definitions"})
_WHOLE = ("$ref", "anyOf", "oneOf", "allOf", "enum", "const")  # each decides alone
_FORMATS = frozenset(
    {
        *("email", "date", "time", "date-time", "duration", "ipv4", "ipv6", "hostname", "uuid", "uri"),
        *("uri-reference", "uri-template"),
    }
)
# Words that the grammar would take into account only without the others of the same row.
_ALONE = (
    (("pattern",), ("minLength", "maxLength", "format")),
    (("format",), ("minLength", "maxLength")),
    (("patternProperties", "propertyNames"), ("minProperties", "maxProperties")),
    (("patternProperties",), ("properties", "additionalProperties", "propertyNames", "required")),
    (("propertyNames",), ("properties", "additionalProperties", "required")),
)


_IPV4 = r"^(?:(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)\.){3}(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)$"


def checked_schema(schema: Any, where: str) -> str:
    """The schema as JSON text, in the form that compiles to exactly its meaning.

    Raises RequestError that names the path below `where` of what can't be enforced.
    """
    text = json.dumps(schema, ensure_ascii=False)
    if len(text) > MAX_CHARACTERS:
        _refuse(where, f"a schema has at most {MAX_CHARACTERS} characters, not {len(text)}")
    _check(schema, where, schema, 1)
    return json.dumps(_rewritten(schema), ensure_ascii=False)


def _rewritten(schema: Any) -> Any:
    """Length limits as a pattern: as they are, xgrammar lets control characters into such strings. Likewise IPv4
    addresses, in which it allows leading zeros."""
    if not isinstance(schema, Mapping):
        return schema
    out = dict(schema)
    for word in _ONE & set(out):
        out[word] = _rewritten(out[word])
    for word in _LISTS & set(out):
        out[word] = [_rewritten(part) for part in out[word]]
    for word in _MAPS & set(out):
        out[word] = {name: _rewritten(part) for name, part in out[word].items()}
    if out.get("format") == "ipv4":
        out["pattern"] = _IPV4
        del out["format"]
    low, high = out.pop("minLength", None), out.pop("maxLength", None)
    if type(low) is int or type(high) is int:
        out["pattern"] = f"^[\\s\\S]{{{low or 0},{'' if high is None else high}}}$"
    return out


def _check(schema: Any, where: str, root: Any, depth: int) -> None:
    if depth > MAX_DEPTH:
        _refuse(where, f"a schema is nested at most {MAX_DEPTH} deep")
    if schema is True:
        return
    if not isinstance(schema, Mapping):
        _refuse(where, "must be an object or true" if schema is not False else "false allows nothing")
    for word in (_LISTS | _MAPS) & set(schema):
        if not isinstance(schema[word], list if word in _LISTS else Mapping):
            _refuse(f"{where}.{word}", f"must be {'a list' if word in _LISTS else 'an object'}")
    if any(not isinstance(t, str) or t not in _TYPES for t in _types(schema)):
        _refuse(f"{where}.type", f"must be of {', '.join(sorted(_TYPES))}")
    words = set(schema) - NOTES
    whole = [word for word in _WHOLE if word in words]
    if whole:
        _check_whole(schema, whole[0], words, where, root)
    else:
        _check_words(schema, words, where)
    for name, part in _parts(schema):
        _check(part, f"{where}.{name}", root, depth + 1)


def _check_whole(schema: Mapping[str, Any], word: str, words: set[str], where: str, root: Any) -> None:
    others = words - {word} - ({"type"} if word in ("enum", "const") else set())
    if others:
        _refuse(f"{where}.{min(others)}", f"cannot be enforced beside {word}")
    value = schema[word]
    if word == "$ref":
        if not isinstance(value, str) or not (value == "#" or value.startswith("#/")) or target(root, value) is None:
            _refuse(f"{where}.$ref", "must point into this schema (#/...)")
    elif word not in ("$ref", "const") and not (isinstance(value, list) and value):
        _refuse(f"{where}.{word}", "must be a list that is not empty")
    elif word in ("enum", "const") and not _fit(value if word == "enum" else [value], _types(schema)):
        _refuse(f"{where}.{word}", "has a value of another type than the one beside it")
    elif word == "allOf" and len(value) > 1:
        _refuse(f"{where}.allOf", "more than one schema together cannot be enforced")
    elif word == "oneOf" and not all(_disjoint(a, b, root) for a, b in combinations(value, 2)):
        _refuse(f"{where}.oneOf", "is enforced only where the schemas exclude each other; use anyOf")


def _types(schema: Mapping[str, Any]) -> list[Any]:
    """What stands under `type`, as a list."""
    types = schema.get("type", [])
    return types if isinstance(types, list) else [types]


def _fit(values: list[Any], types: list[str]) -> bool:
    """Whether all values are of the types, where there are some."""
    return not types or all(kinds_of_value(value) & set(types) for value in values)


def _check_words(schema: Mapping[str, Any], words: set[str], where: str) -> None:
    named = _types(schema)
    allowed = {"type"}
    for name, more in (("string", _STRING), ("array", _ARRAY), ("object", _OBJECT)):
        allowed |= more if name in named else set()
    allowed |= _NUMBER if {"integer", "number"} & set(named) else set()
    unknown = words - allowed
    if unknown:
        word = min(unknown)
        known = word in _STRING | _NUMBER | _ARRAY | _OBJECT
        _refuse(f"{where}.{word}", "needs the matching type beside it" if known else "cannot be enforced")
    for some, others in _ALONE:
        for word in others:
            if word in words and words & set(some):
                _refuse(f"{where}.{word}", f"cannot be enforced beside {some[0]}")
    _check_values(schema, where)


def _check_values(schema: Mapping[str, Any], where: str) -> None:
    _check_numbers(schema, where)
    if schema.get("uniqueItems"):
        _refuse(f"{where}.uniqueItems", "cannot be enforced")
    if schema.get("minProperties", 0) > 1 and schema.get("additionalProperties", not schema.get("properties")):
        _refuse(f"{where}.minProperties", "cannot be enforced where names are free: they may come twice")
    if schema.get("format", "uuid") not in _FORMATS:
        _refuse(f"{where}.format", "this format cannot be enforced")
    if "pattern" in schema:
        check_json_pattern(schema["pattern"], f"{where}.pattern")
    for pattern in _map(schema, "patternProperties"):
        check_json_pattern(pattern, f"{where}.patternProperties.{pattern[:64]}")
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        _refuse(f"{where}.required", "must be a list of strings")
    missing = [name for name in required if name not in properties]
    if missing:
        _refuse(f"{where}.required", f"names {missing[0][:64]!r}, which is not among the properties")


def _check_numbers(schema: Mapping[str, Any], where: str) -> None:
    for word in _NUMBER & set(schema):
        if type(schema[word]) not in (int, float):
            _refuse(f"{where}.{word}", "must be a number")
    for word in _COUNTS & set(schema):
        if type(schema[word]) is not int or schema[word] < 0:
            _refuse(f"{where}.{word}", "must be an integer of at least 0")
        if word.endswith("Length") and schema[word] > MAX_STRING:
            _refuse(f"{where}.{word}", f"can be enforced up to {MAX_STRING} only")
    if "multipleOf" in schema and not (schema.get("type") == "integer" and type(schema["multipleOf"]) is int):
        _refuse(f"{where}.multipleOf", "can be enforced for integers only")


def _parts(schema: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Schemas inside, with their path."""
    for word in _ONE & set(schema):
        if schema[word] is not False:
            yield word, schema[word]
    for word in _LISTS & set(schema):
        for i, part in enumerate(listed(schema, word)):
            yield f"{word}[{i}]", part
    for word in _MAPS & set(schema):
        for name, part in _map(schema, word).items():
            yield f"{word}.{name[:64]}", part


def _disjoint(a: Any, b: Any, root: Any) -> bool:
    """Whether no value can fit both: other types, or a required property that has other constants."""
    a, b = resolved(a, root), resolved(b, root)
    kinds = kinds_of(a, root), kinds_of(b, root)
    if kinds[0] and kinds[1] and not kinds[0] & kinds[1] and not {"integer", "number"} <= kinds[0] | kinds[1]:
        return True
    if _constants(a) and _constants(b):
        return not set(_constants(a)) & set(_constants(b))
    shared = set(listed(a, "required")) & set(listed(b, "required"))
    for name in shared:
        constants = [_constants(resolved(_map(s, "properties").get(name), root)) for s in (a, b)]
        if all(constants) and not set(constants[0]) & set(constants[1]):
            return True
    return False


def _constants(schema: Mapping[str, Any]) -> list[str]:
    values = [schema["const"]] if "const" in schema else listed(schema, "enum")
    return [json.dumps(value, sort_keys=True) for value in values]


def _map(schema: Mapping[str, Any], word: str) -> Mapping[str, Any]:
    value = schema.get(word)
    return value if isinstance(value, Mapping) else {}


def _refuse(where: str, message: str) -> NoReturn:
    raise RequestError(f"{where}: {message}", param=where, code="unsupported_schema")
