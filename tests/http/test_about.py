"""The endpoints that say what the server is and how it fares."""

from __future__ import annotations

import asyncio
from typing import Any

from tests.http.driver import exchange
from tests.http.fake_engine import make_server
from tpqwen.api.app import build_app
from tpqwen.engine.protocol import EngineState


def test_the_model_is_listed_and_found_by_its_name() -> None:
    server = make_server()
    listed = exchange(server.app, "GET", "/v1/models").json()
    assert [m["id"] for m in listed["data"]] == ["qwen3-test"]
    model = exchange(server.app, "GET", "/v1/models/qwen3-test").json()
    assert (model["id"], model["object"], model["max_model_len"]) == ("qwen3-test", "model", 512)
    able = {name for name, value in model["capabilities"].items() if value}
    assert able == {"completion", "chat", "thinking", "tools"}
    missing = exchange(server.app, "GET", "/v1/models/org/other")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


def test_health_and_readiness_follow_the_engine() -> None:
    server = make_server()
    for name, health, ready in (
        ("ready", 200, 200),
        ("degraded", 200, 200),
        ("loading", 200, 503),
        ("draining", 200, 503),
        ("dead", 503, 503),
    ):
        server.engine.current = EngineState(name, "why")
        answer = exchange(server.app, "GET", "/health")
        assert (answer.status_code, answer.json()) == (health, {"status": name, "reason": "why"})
        answer = exchange(server.app, "GET", "/ready")
        assert (answer.status_code, answer.json()["ready"]) == (ready, ready == 200)
    assert exchange(server.app, "HEAD", "/health").status_code == 503


def test_metrics_are_plain_text_of_this_or_all_replicas() -> None:
    server = make_server()
    answer = exchange(server.app, "GET", "/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert answer.text == "tpqwen_test 1\n"

    async def everyone() -> str:
        return "all 2\n"

    app = build_app(server.engine, server.chat, server.app._info, server.hooks, all_metrics=everyone)
    assert exchange(app, "GET", "/metrics").text == "all 2\n"
    assert exchange(app, "GET", "/metrics?scope=local").text == "tpqwen_test 1\n"


def test_version_names_what_runs() -> None:
    assert exchange(make_server().app, "GET", "/version").json() == {"tpqwen": "0.1.0", "model": "qwen3-test", "tp": 1}


def test_paths_are_relative_to_the_mount_point() -> None:
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request"}

    scope = {"type": "http", "method": "GET", "path": "/qwen/health", "root_path": "/qwen", "headers": []}
    asyncio.run(make_server().app(scope, receive, send))
    assert sent[0]["status"] == 200


def test_lifespan_is_answered() -> None:
    incoming = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])
    sent: list[str] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message["type"])

    async def receive() -> dict[str, Any]:
        return next(incoming)

    asyncio.run(make_server().app({"type": "lifespan"}, receive, send))
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
