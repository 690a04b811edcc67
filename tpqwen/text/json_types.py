"""Types of JSON schema: what a schema allows, what a value is, where a reference points."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

REF_DEPTH = 8


def kinds_of(schema: Any, root: Any, depth: int = REF_DEPTH) -> frozenset[str]:
    """JSON types that a schema allows; empty where it does not say."""
    if not isinstance(schema, Mapping) or not depth:
        return frozenset()
    if isinstance(schema.get("$ref"), str):
        return kinds_of(target(root, schema["$ref"]), root, depth - 1)
    kinds = schema.get("type")
    if isinstance(kinds, str):
        return frozenset({kinds})
    if isinstance(kinds, list):
        return frozenset(k for k in kinds if isinstance(k, str))
    choices = [part for word in ("anyOf", "oneOf", "allOf") for part in listed(schema, word)]
    named = [*listed(schema, "enum"), *([schema["const"]] if "const" in schema else ())]
    return frozenset().union(*(kinds_of(part, root, depth - 1) for part in choices), *map(kinds_of_value, named))


def listed(schema: Mapping[str, Any], word: str) -> list[Any]:
    """The list under a word, empty if there is none."""
    value = schema.get(word)
    return value if isinstance(value, list) else []


def target(root: Any, ref: str) -> Any:
    """What a local JSON pointer (#/$defs/x) points to, None if nothing."""
    place: Any = root
    for name in ref.removeprefix("#").split("/")[1:]:
        place = place.get(name.replace("~1", "/").replace("~0", "~")) if isinstance(place, Mapping) else None
    return place


def resolved(schema: Any, root: Any) -> Mapping[str, Any]:
    """The schema that a chain of references ends at; empty where it ends nowhere."""
    for _ in range(REF_DEPTH):
        if not (isinstance(schema, Mapping) and isinstance(schema.get("$ref"), str)):
            return schema if isinstance(schema, Mapping) else {}
        schema = target(root, schema["$ref"])
    return {}


def kinds_of_value(value: object) -> frozenset[str]:
    """Types of JSON schema that a value has."""
    if value is None:
        return frozenset({"null"})
    if isinstance(value, bool):
        return frozenset({"boolean"})
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return frozenset({"integer", "number"})
    kinds = {float: "number", str: "string", list: "array", dict: "object"}
    return frozenset({kinds[type(value)]})
