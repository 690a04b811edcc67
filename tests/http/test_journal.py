"""A line in the log for every request, but one a second of a flood of refusals."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from tests.http.fake_engine import Server, make_server
from tests.http.test_access import ALICE, BOB, ask, closed
from tpqwen.api.journal import EVERY_S, Journal
from tpqwen.errors import Overloaded


def full(request: Any) -> list[Any]:
    return [Overloaded("full", code="queue_full")]


@pytest.fixture
def now() -> list[float]:
    return [50.0]


def logged(caplog: pytest.LogCaptureFixture, *words: str) -> list[str]:
    """The lines since the last look, reduced to the fields that are named."""
    lines = [r.getMessage() for r in caplog.records if r.name == "tpqwen.api.journal"]
    caplog.clear()
    return [" ".join(w for w in line.split() if w.partition("=")[0] in words) for line in lines]


def watched(server: Server, now: list[float]) -> Server:
    server.app._journal = Journal(server.hooks, lambda: now[0])
    return server


def test_a_flood_of_refusals_has_one_line_a_second_that_counts_the_rest(caplog, now) -> None:
    server = watched(closed(script=full), now)
    with caplog.at_level(logging.INFO):
        for key in (ALICE, ALICE, ALICE, BOB, ALICE):
            assert ask(server, key).status_code == 429
        fields = ("status", "code", "key", "refused")
        expected = "status=429 code=queue_full key={} refused={}"
        assert logged(caplog, *fields) == [expected.format("alice", 1), expected.format("bob", 1)]
        now[0] += EVERY_S
        for _ in range(2):
            ask(server)
        assert logged(caplog, *fields) == [expected.format("alice", 4)]
    assert len([c for c in server.hooks.named("http") if c[2] == 429]) == 7  # the metrics have them all


def test_whatever_else_is_asked_has_a_line_each(caplog, now) -> None:
    server = watched(make_server(), now)
    with caplog.at_level(logging.INFO):
        for body in ({}, {}, {"prompt": 5}, {"prompt": 5}):
            ask(server, **body)
        assert logged(caplog, "status", "refused") == ["status=200"] * 2 + ["status=400"] * 2


def test_a_line_says_where_the_time_to_the_first_token_went(caplog, now) -> None:
    server = watched(make_server(), now)
    with caplog.at_level(logging.INFO):
        ask(server)
        ask(server, n=2, stream=True)
        lines = logged(caplog, "output", "prepared_ms", "queue_ms", "first_ms")
        assert len(lines) == 2
        for line in lines:
            found = {name: float(value) for name, value in (word.split("=") for word in line.split())}
            assert found["output"] > 0 and 0 <= found["queue_ms"] <= 1e4
            assert 0 <= found["prepared_ms"] <= found["first_ms"]


def test_a_line_without_a_token_says_when_the_prompt_was_ready(caplog, now) -> None:
    server = watched(make_server(script=full), now)
    with caplog.at_level(logging.INFO):
        assert ask(server).status_code == 429
        (line,) = logged(caplog, "prepared_ms", "queue_ms", "first_ms")
    assert line.startswith("prepared_ms=") and "queue" not in line and "first" not in line
