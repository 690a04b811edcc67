"""The surface described from its tables: as an OpenAPI document, as the page at /docs, as Markdown for docs/api.md."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Iterable
from typing import Any

from tpqwen.api.endpoints import ENDPOINTS, Endpoint
from tpqwen.api.fields import Field, schema

# What any request may be answered with beside success; see api.failures.
_POST_ERRORS = {
    "400": "the request is wrong; param names the field",
    "401": "an API key is missing or wrong",
    "404": "another model, or nothing is here",
    "413": "the body is too large",
    "415": "the body is not JSON",
    "429": "too much is waiting, or a limit of the key is reached",
    "500": "a bug, or NaN in this request",
    "503": "loading, draining, or the engine is lost",
    "504": "the request's own timeout passed",
}
_GET_ERRORS = {"400": _POST_ERRORS["400"], "401": _POST_ERRORS["401"], "404": _POST_ERRORS["404"]}


def document(version: str, model: str) -> dict[str, Any]:
    """The OpenAPI 3.1 document. model: the served name."""
    paths: dict[str, Any] = {}
    for endpoint in ENDPOINTS:
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = _operation(endpoint, model)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "tpqwen",
            "version": version,
            "description": "Qwen3 behind the APIs of OpenAI and Anthropic.",
        },
        "paths": paths,
        "components": {"schemas": {"Error": _ERROR}},
    }


_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type"],
        }
    },
    "required": ["error"],
}


_EVENT = {"type": "object", "properties": {"event": {"type": "string"}, "data": {"type": "string"}}}
_KINDS: dict[str, dict[str, Any]] = {"application/json": {"type": "object"}, "text/event-stream": _EVENT}


def _operation(endpoint: Endpoint, model: str) -> dict[str, Any]:
    post = endpoint.method == "POST"
    content: dict[str, Any] = {endpoint.kind: {"schema": _KINDS.get(endpoint.kind, {"type": "string"})}}
    if endpoint.streams:
        content["text/event-stream"] = {"schema": _EVENT}
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    errors = _POST_ERRORS if post else _GET_ERRORS
    responses: dict[str, Any] = {"200": {"description": "the answer", "content": content}}
    responses |= {code: {"description": text, "content": error} for code, text in errors.items()}
    if endpoint.path == "/v1/engine/events":
        responses["429"] = {"description": "too many look on already", "content": error}
    if endpoint.path in ("/health", "/ready"):
        responses["503"] = {"description": "no; the body says why", "content": content}
    out: dict[str, Any] = {
        "operationId": f"{endpoint.method.lower()} {endpoint.name}".replace(" ", "_").replace("{id}", "id"),
        "summary": endpoint.summary,
        "responses": responses,
    }
    if "{id}" in endpoint.path:
        out["parameters"] = [{"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}]
    if post:
        body = schema(endpoint.fields)
        body["properties"]["model"] = {"enum": [model, None]}
        out["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    return out


def spelled(shape: dict[str, Any]) -> str:
    """A JSON schema in a few words: type and range, as they stand in the tables."""
    if "oneOf" in shape or "anyOf" in shape:
        return ", or ".join(spelled(s) for s in shape.get("oneOf", shape.get("anyOf", ())))
    if "enum" in shape or "const" in shape:
        return ", ".join(json.dumps(v) for v in shape.get("enum", [shape.get("const")]))
    kind = shape.get("type")
    spell = _SPELLINGS.get(kind if isinstance(kind, str) else "")
    return spell(shape) if spell else "any"


def _number(shape: dict[str, Any]) -> str:
    low, high = shape.get("minimum"), shape.get("maximum")
    name = "integer" if shape["type"] == "integer" else "number"
    if "exclusiveMinimum" in shape:
        return f"{name} above {shape['exclusiveMinimum']}, to {high}"
    if low == -(1 << 63):
        return "int64"
    if low == -(1 << 31) and high == (1 << 31) - 1:
        return "int32"
    if high is None or high >= 1 << 20:
        return name if low is None else f"{name}, at least {low}"
    return f"{name} {low}..{high}"


def _string(shape: dict[str, Any]) -> str:
    low, high = shape.get("minLength", 0), shape.get("maxLength")
    return "string" if high is None else f"string of {low}..{high} characters"


def _array(shape: dict[str, Any]) -> str:
    low, high = shape.get("minItems", 0), shape.get("maxItems")
    count = "" if high is None else f"{low}..{high} " if low else f"up to {high} "
    return f"list of {count}({spelled(shape['items'])})"


def _object(shape: dict[str, Any]) -> str:
    properties = shape.get("properties")
    if properties:
        return "object: " + "; ".join(f"`{k}` {spelled(v)}" for k, v in properties.items())
    values = shape.get("additionalProperties")
    if isinstance(values, dict):
        return f"object of up to {shape.get('maxProperties', 'any')} ({spelled(values)})"
    return "object"


_SPELLINGS: dict[str, Callable[[dict[str, Any]], str]] = {
    "integer": _number,
    "number": _number,
    "boolean": lambda shape: "boolean",
    "string": _string,
    "array": _array,
    "object": _object,
    "null": lambda shape: "null",
}


def rows(fields: Iterable[Field]) -> list[tuple[str, str, str, str]]:
    """(field, type and range, default, meaning) for a table."""
    return [
        (f.name, f.says or spelled(f.shape.schema()), "required" if f.required else f.default, f.doc) for f in fields
    ]


def markdown() -> str:
    """The tables of docs/api.md: endpoints, then one table of parameters for each that has some."""
    lines = ["## Endpoints", "", "| endpoint | |", "|---|---|"]
    lines += [f"| `{e.method} {e.path}` | {e.summary} |" for e in ENDPOINTS]
    known: list[Field] = []
    for e in ENDPOINTS:
        if not e.fields:
            continue
        lines += ["", f"### `{e.method} {e.path}`", "", "| field | type and range | default | meaning |"]
        lines += ["|---|---|---|---|"]
        own = [f for f in e.fields if f not in known]
        lines += [f"| `{name}` | {kind} | {default} | {doc} |" for name, kind, default, doc in rows(own)]
        as_above = [f"`{f.name}`" for f in e.fields if f in known]
        lines += ["", "As above: " + ", ".join(as_above) + "."] if as_above else []
        known += own
    return "\n".join(lines) + "\n"


def page() -> str:
    """The same as one HTML page that loads nothing from anywhere."""
    parts = []
    for e in ENDPOINTS:
        parts.append(f"<h2><code>{e.method} {html.escape(e.path)}</code></h2><p>{html.escape(e.summary)}.</p>")
        if e.fields:
            cells = [
                "".join(f"<td>{html.escape(c).replace('`', '')}</td>" for c in (kind, default, doc))
                for _, kind, default, doc in rows(e.fields)
            ]
            names = [f"<th scope=row><code>{html.escape(f.name)}</code></th>" for f in e.fields]
            body = "".join(f"<tr>{n}{c}</tr>" for n, c in zip(names, cells, strict=True))
            head = "<tr><th>field<th>type and range<th>default<th>meaning</tr>"
            parts.append(f"<table>{head}{body}</table>")
    return _PAGE.replace("BODY", "\n".join(parts))


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>tpqwen: the HTTP surface</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
:root { color-scheme: light dark }
table { border-collapse: collapse; width: 100% } th, td { border-bottom: 1px solid #8886; padding: .3rem .6rem }
th, td { text-align: left; vertical-align: top } h2 { margin-top: 2.5rem }
</style>
<h1>The HTTP surface</h1>
<p>Any other field of a request is a 400 that names it. The same as <a href="openapi.json">OpenAPI</a>.</p>
BODY
"""
