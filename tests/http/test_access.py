"""API keys in front of the HTTP surface: every path closed, limits told, caches apart, nothing secret in logs."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from tests.http.driver import CHAT, COMPLETIONS, Connection, exchange, post
from tests.http.fake_engine import Server, ids, make_server
from tests.http.test_errors import check_error
from tpqwen.api.access import OPEN_PATHS, Access
from tpqwen.api.keys import Keyring
from tpqwen.metrics import ServerMetrics

ALICE, BOB = "tpq_alice_0123456789abcdef", "tpq_bob_0123456789abcdefgh"


def closed(limits: str = "", script: Any = None, **options: Any) -> Server:
    access = Access(Keyring.parse(f"alice {ALICE} {limits}\nbob {BOB}"), **options)
    return make_server(script, access=access)


def bearer(key: str = ALICE) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def ask(server: Server, key: str = ALICE, **body: Any) -> Any:
    return exchange(server.app, "POST", COMPLETIONS, json={"prompt": "hello", **body}, headers=bearer(key))


def test_every_route_but_health_and_static_pages_is_closed_without_a_key() -> None:
    server = closed()
    routes = server.app.served
    assert {path for _, path in routes} >= {CHAT, COMPLETIONS, "/v1/models", "/metrics", "/version", *OPEN_PATHS}
    assert {"/health", "/ready", "/", "/docs"} == OPEN_PATHS
    for method, path in [*routes, ("GET", "/nothing"), ("DELETE", CHAT), ("GET", "/healthy"), ("GET", "/health/x")]:
        answer = exchange(server.app, method, path)
        if path in OPEN_PATHS:
            assert answer.status_code == 200
            continue
        assert answer.headers["www-authenticate"] == "Bearer"
        if path.startswith("/v1/messages"):  # Anthropic's shape
            assert (answer.status_code, answer.json()["error"]["type"]) == (401, "authentication_error")
            continue
        assert check_error(answer, 401, "missing_api_key")["type"] == "authentication_error"
        check_error(exchange(server.app, method, path, headers=bearer("wrong" * 6)), 401, "invalid_api_key")
    assert not server.engine.requests
    assert exchange(server.app, "GET", "/v1/models", headers=bearer()).status_code == 200


@pytest.mark.parametrize("header", ["Bearer", "Bearer ", "Basic " + ALICE, ALICE, "", "bearer\t" + ALICE])
def test_what_is_no_bearer_token_is_no_key(header: str) -> None:
    check_error(exchange(closed().app, "GET", "/v1/models", headers={"authorization": header}), 401, "missing_api_key")


def test_a_host_that_looks_like_an_open_path_opens_nothing() -> None:
    for host in ("x/health?", "x/?a=", "/health"):
        check_error(exchange(closed().app, "GET", "/version", headers={"host": host}), 401, "missing_api_key")


def test_a_key_is_taken_in_openais_and_in_anthropics_header() -> None:
    server = closed()
    for headers in ({"authorization": f"bearer {ALICE}"}, {"x-api-key": BOB}):
        assert exchange(server.app, "GET", "/version", headers=headers).status_code == 200
    check_error(exchange(server.app, "GET", "/version", headers={"x-api-key": "x" * 30}), 401, "invalid_api_key")


def test_an_unread_body_of_a_stranger_costs_nothing() -> None:
    server = closed()
    answer = exchange(server.app, "POST", CHAT, content=b"{" * 3_000_000, headers={"content-type": "application/json"})
    check_error(answer, 401, "missing_api_key")


def test_metrics_are_open_only_where_that_is_asked_for() -> None:
    check_error(exchange(closed().app, "GET", "/metrics"), 401, "missing_api_key")
    assert exchange(closed(open_metrics=True).app, "GET", "/metrics").status_code == 200
    assert exchange(closed().app, "GET", "/metrics", headers=bearer()).status_code == 200


def test_limits_are_told_with_every_answer_and_each_key_has_its_own() -> None:
    server = closed("requests_per_minute=2 tokens_per_minute=1000 concurrency=1")
    answer = ask(server)
    assert answer.status_code == 200
    assert answer.headers["x-ratelimit-limit-requests"] == "2"
    assert answer.headers["x-ratelimit-remaining-requests"] == "1"
    left = int(answer.headers["x-ratelimit-remaining-tokens"])
    used = answer.json()["usage"]["total_tokens"]
    assert left == 1000 - used
    streamed = ask(server, stream=True)
    assert streamed.status_code == 200 and streamed.headers["x-ratelimit-remaining-requests"] == "0"
    refused = ask(server)
    error = check_error(refused, 429, "requests_per_minute")
    assert error["type"] == "rate_limit_exceeded"
    assert 1 <= int(refused.headers["retry-after"]) <= 30
    assert server.hooks.named("rejected") == [("rate_limit",)]
    assert "x-ratelimit-limit-requests" not in ask(server, BOB).headers


def test_a_prompt_beyond_the_tokens_of_a_minute_is_refused_for_good() -> None:
    server = closed("tokens_per_minute=10")
    answer = ask(server, prompt=[1] * 11)
    check_error(answer, 429, "tokens_per_minute")
    assert answer.headers["x-should-retry"] == "false"
    assert not server.engine.requests
    assert ask(server, prompt=[1] * 3, max_tokens=1).status_code == 200


def test_a_running_stream_counts_against_concurrency_until_its_client_has_left() -> None:
    server = closed("concurrency=1", lambda request: [*ids("Hello"), 30.0])

    async def run() -> None:
        first = Connection(server.app, COMPLETIONS, {"prompt": "a", "stream": True}, bearer())
        running = asyncio.create_task(first.run())
        await first.until("data: ")
        second = Connection(server.app, COMPLETIONS, {"prompt": "a"}, bearer())
        await second.run()
        assert second.status == 429 and b"concurrency" in second.sent[0]
        first.leave()
        await running
        server.engine.script = lambda request: ids("Hello")
        third = Connection(server.app, COMPLETIONS, {"prompt": "a"}, bearer())
        await third.run()
        assert third.status == 200

    asyncio.run(asyncio.wait_for(run(), 20))
    assert not server.engine.live


def test_keys_never_share_a_prefix_cache_and_salts_divide_a_keys_own() -> None:
    server = closed()
    for key, salt in ((ALICE, None), (ALICE, None), (BOB, None), (ALICE, "s"), (BOB, "s")):
        assert ask(server, key, cache_salt=salt).status_code == 200
    salts = [request.cache_salt for request in server.engine.requests]
    assert salts[0] == salts[1]
    assert len(set(salts)) == 4 and all(len(salt) == 64 for salt in salts)
    other = closed()
    ask(other)
    assert other.engine.requests[0].cache_salt not in salts  # the secret is the replica's own
    free = make_server()
    post(free.app, COMPLETIONS, prompt="hello", cache_salt="mine")
    assert free.engine.requests[0].cache_salt == "mine"


def test_a_key_cannot_ask_for_a_better_priority_than_it_has() -> None:
    server = closed("priority=-2")
    assert ask(server, priority=-2).status_code == 200
    check_error(ask(server, priority=-3), 400, "out_of_range", "priority")
    check_error(ask(server, BOB, priority=-1), 400, "out_of_range", "priority")
    assert ask(server, BOB, priority=9).status_code == 200


def test_neither_keys_nor_prompts_nor_answers_are_logged_or_counted(caplog: pytest.LogCaptureFixture) -> None:
    canaries = ["canaryprompt", "canaryanswer", "canaryfield", "canarykeycanarykeycanary", ALICE, "canarypath"]
    metrics = ServerMetrics("m")
    server = closed(script=lambda request: ids("canaryanswer"))
    server.app._hooks = server.app._journal._hooks = metrics
    with caplog.at_level(logging.DEBUG):
        assert ask(server, prompt="canaryprompt").status_code == 200
        assert ask(server, prompt="canaryprompt", stream=True).status_code == 200
        message = {"role": "user", "content": "canaryprompt"}
        assert exchange(server.app, "POST", CHAT, json={"messages": [message]}, headers=bearer()).status_code == 200
        assert ask(server, prompt="canaryprompt", canaryfield=1).status_code == 400
        assert ask(server, prompt=["canaryprompt", 5]).status_code == 400
        assert ask(server, "canarykeycanarykeycanary").status_code == 401
        assert exchange(server.app, "GET", "/canarypath", headers=bearer()).status_code == 404
        server.engine.script = lambda request: [RuntimeError("broken")]
        assert ask(server, prompt="canaryprompt").status_code == 500
    text = "".join(r.getMessage() for r in caplog.records if r.name.startswith("tpqwen")) + metrics.metrics_text()
    assert "key=alice" in caplog.text
    assert [c for c in canaries if c in text] == []
