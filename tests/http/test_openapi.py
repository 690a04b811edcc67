"""The surface described from its tables equals the surface itself, and docs/api.md equals both."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest

from tests.http.driver import exchange, post
from tests.http.fake_engine import make_server
from tpqwen.api.endpoints import ENDPOINTS
from tpqwen.api.openapi import document, markdown, spelled

DOCS = Path(__file__).parents[2] / "docs" / "api.md"


def test_docs_page_has_the_tables_as_they_are() -> None:
    assert "\n" + markdown() in DOCS.read_text(encoding="utf-8"), "run python tools/api_tables.py"


def test_every_route_is_described_and_every_described_route_is_there() -> None:
    assert set(make_server().app.served) == {(e.method, e.path) for e in ENDPOINTS}


def test_document_is_served_and_its_schemas_are_schemas() -> None:
    server = make_server()
    served = exchange(server.app, "GET", "/openapi.json").json()
    assert served == document("0.1.0", "qwen3-test")
    assert served["openapi"].startswith("3.1")
    for methods in served["paths"].values():
        for operation in methods.values():
            if body := operation.get("requestBody"):
                jsonschema.Draft202012Validator.check_schema(body["content"]["application/json"]["schema"])
    names = [o["operationId"] for methods in served["paths"].values() for o in methods.values()]
    assert len(set(names)) == len(names)


def test_page_names_every_field_and_loads_nothing() -> None:
    answer = exchange(make_server().app, "GET", "/docs")
    assert answer.headers["content-type"].startswith("text/html")
    for endpoint in ENDPOINTS:
        assert endpoint.path in answer.text
        assert all(f"<code>{f.name}</code>" in answer.text for f in endpoint.fields)
    assert "src=" not in answer.text and "//" not in answer.text


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "integer", "minimum": 1, "maximum": 16}, "integer 1..16"),
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 1}, "number above 0, to 1"),
        ({"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}, "list of (integer, at least 0)"),
        ({"anyOf": [{"type": "string"}, {"const": False}, {}]}, "string, or false, or any"),
    ],
)
def test_schemas_in_words(schema: dict[str, object], words: str) -> None:
    assert spelled(schema) == words


def test_errors_match_the_document() -> None:
    schema = document("", "")["components"]["schemas"]["Error"]
    server = make_server()
    for answer in (
        post(server.app, "/tokenize"),
        exchange(server.app, "GET", "/nothing"),
        exchange(server.app, "GET", "/v1/completions"),
    ):
        jsonschema.validate(answer.json(), schema)
