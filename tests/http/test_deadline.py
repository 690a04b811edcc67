"""Deadlines: before the first byte a 504, after it one error event; whichever passes first is the one that is named."""

from __future__ import annotations

from typing import Any

import pytest

from tests.http.driver import CHAT, HELLO, events, post
from tests.http.fake_engine import Server, ids, make_server
from tests.http.test_errors import check_error


def slow(first_s: float, later_s: float, **settings: Any) -> Server:
    """The first token after first_s, three more with later_s before each."""
    text = ids("abcd")
    return make_server(lambda request: [first_s, text[0], *(x for t in text[1:] for x in (later_s, t))], **settings)


@pytest.mark.parametrize("stream", [False, True])
def test_no_first_token_in_time_is_a_504(stream: bool) -> None:
    server = slow(30.0, 0.0, first_token_timeout_s=0.05, total_timeout_s=20.0)
    error = check_error(post(server.app, CHAT, messages=HELLO, stream=stream, timeout=10), 504, "deadline_exceeded")
    assert "0.05 s for a first token" in error["message"]
    assert not server.engine.live


def test_after_the_first_token_its_deadline_is_over() -> None:
    for stream in (False, True):
        server = slow(0.0, 0.1, first_token_timeout_s=0.15)
        assert post(server.app, CHAT, messages=HELLO, stream=stream).status_code == 200


def test_a_whole_answer_that_takes_too_long_is_a_504() -> None:
    server = slow(0.0, 30.0, first_token_timeout_s=10.0, total_timeout_s=0.1)
    error = check_error(post(server.app, CHAT, messages=HELLO), 504, "deadline_exceeded")
    assert "0.1 s for one answer" in error["message"]
    assert not server.engine.live


def test_a_stream_that_takes_too_long_ends_with_one_error_and_without_done() -> None:
    server = slow(0.0, 30.0, first_token_timeout_s=10.0, total_timeout_s=0.2)
    answer = post(server.app, CHAT, messages=HELLO, stream=True)
    assert answer.status_code == 200
    *_, last = events(answer.text)
    assert last["error"]["code"] == "deadline_exceeded"
    assert not server.engine.live


@pytest.mark.parametrize(("own", "named"), [(0.1, "the request's timeout of 0.1 s"), (60, "0.2 s for one answer")])
def test_the_shorter_of_the_requests_and_the_servers_limit_counts(own: float, named: str) -> None:
    server = slow(0.0, 30.0, first_token_timeout_s=10.0, total_timeout_s=0.2)
    error = check_error(post(server.app, CHAT, messages=HELLO, timeout=own), 504, "deadline_exceeded")
    assert named in error["message"]


def test_the_requests_own_timeout_may_pass_before_the_first_token() -> None:
    server = slow(30.0, 0.0, first_token_timeout_s=10.0)
    error = check_error(post(server.app, CHAT, messages=HELLO, timeout=0.05), 504, "deadline_exceeded")
    assert "the request's timeout of 0.05 s" in error["message"]
