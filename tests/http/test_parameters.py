"""The parameter tables, row by row: the value acts, its opposite is refused by name, and nothing is left out."""

from __future__ import annotations

import pytest

from tests.http.driver import post
from tests.http.fake_engine import ids, make_server
from tests.http.parameters import TABLES, Row, Seen
from tests.http.test_structured import FakeCompiler
from tpqwen.api.endpoints import ENDPOINTS
from tpqwen.model.config import Task

TASKS = {"/v1/embeddings": Task.EMBED, "/v1/rerank": Task.RERANK}
ALL = [(path, name, row) for path, (_, rows) in TABLES.items() for name, row in rows.items()]


def test_every_parameter_has_its_row() -> None:
    tables = {e.path: sorted(f.name for f in e.fields) for e in ENDPOINTS if e.fields}
    assert {path: sorted(rows) for path, (_, rows) in TABLES.items()} == tables


@pytest.mark.parametrize(("path", "name", "row"), ALL, ids=[f"{path}:{name}" for path, name, _ in ALL])
def test_parameter(path: str, name: str, row: Row) -> None:
    script = lambda request: ids(row.said)  # noqa: E731
    server = make_server(script, task=TASKS.get(path, Task.GENERATE), compiler=FakeCompiler())
    always = TABLES[path][0]
    answer = post(server.app, path, **{**always, **row.also, name: row.value})
    assert answer.status_code == 200, answer.text
    assert row.acts(Seen(server, answer))
    refused = post(server.app, path, **{**always, **row.also, name: row.bad})
    assert refused.status_code == row.status, refused.text
    error = refused.json()["error"]
    assert name in (error["message"] if path.startswith("/v1/messages") else error["param"])
