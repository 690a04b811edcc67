"""Random requests: bytes over raw sockets, and JSON in every field. Never a 5xx, never a dead server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.http.driver import CHAT, COMPLETIONS, exchange
from tests.http.fake_engine import Server, make_server
from tests.http.live import Live, completion, live
from tpqwen.api import fields

QUIET_S = 0.1


def examples(count: int) -> settings:
    """The same ones each time."""
    return settings(
        max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )


FIELDS = {COMPLETIONS: fields.COMPLETIONS, CHAT: fields.CHAT}


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live(body_timeout_s=0.2) as here:
        yield here


@pytest.fixture(scope="module")
def app() -> Server:
    return make_server()


def statuses(answer: bytes) -> list[int]:
    """Of all answers in what a connection brought."""
    parts = answer.split(b"HTTP/1.1 ")
    assert not parts[0]
    return [int(part[:3]) for part in parts[1:]]


def send(server: Live, data: bytes) -> list[int]:
    """What is answered while the connection is open and for a moment after; unfinished requests get no answer."""
    client = server.connect()
    client.settimeout(QUIET_S)
    answer = b""
    try:
        client.sendall(data)
        while chunk := client.recv(65536):
            answer += chunk
    except (TimeoutError, BrokenPipeError, ConnectionResetError):  # it waits for more, or has seen enough
        pass
    finally:
        client.close()
    return statuses(answer)


@examples(60)
@given(st.binary(max_size=300))
def test_bytes_that_are_no_http_get_one_answer_at_most(server: Live, data: bytes) -> None:
    codes = send(server, data)
    assert len(codes) <= 1
    assert all(400 <= code < 500 for code in codes)


@examples(100)
@given(
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from("drixs"), st.binary(max_size=8)), max_size=4)
)
def test_a_request_with_changed_bytes_is_answered_or_refused(
    server: Live, edits: list[tuple[float, str, bytes]]
) -> None:
    data = bytearray(completion(max_tokens=2, close=True))
    for place, kind, new in edits:
        at = int(place * len(data))
        if kind == "d":
            del data[at : at + len(new)]
        elif kind == "r":
            data[at : at + len(new)] = new
        elif kind == "i":
            data[at:at] = new
        elif kind == "x":
            data[at : at + 1] = b"\r\n"
        else:
            data[at:at] = data[:at][-40:]
    assert all(code < 500 for code in send(server, bytes(data)))


def test_the_server_is_as_before_after_all_that(server: Live) -> None:
    server.still_serves()


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=20),
    st.sampled_from(["", "\0", "<|im_end|>", "💥", "auto", "user"]),
)
values = st.recursive(
    scalars,
    lambda x: st.one_of(st.lists(x, max_size=4), st.dictionaries(st.text(max_size=8), x, max_size=4)),
    max_leaves=8,
)


def check(answer: Any) -> None:
    """A good answer, or a refusal in OpenAI's shape that echoes no more than 64 characters of anything."""
    assert answer.status_code == 200 or 400 <= answer.status_code < 500, answer.text
    if answer.status_code != 200:
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["code"]
        assert len(error["message"]) < 400


@pytest.mark.parametrize("path", FIELDS)
@examples(150)
@given(data=st.data())
def test_any_json_in_any_field_is_answered_or_refused_by_name(app: Server, path: str, data: st.DataObject) -> None:
    good = {"max_tokens": 2} | (
        {"prompt": "hi"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "hi"}]}
    )
    names = sorted(field.name for field in FIELDS[path] if field.name != "timeout")
    chosen = data.draw(st.dictionaries(st.sampled_from(names), values, min_size=1, max_size=3))
    body = json.dumps(good | chosen).encode()
    check(exchange(app.app, "POST", path, content=body, headers={"content-type": "application/json"}))
    assert not app.engine.live


@examples(150)
@given(st.one_of(st.binary(max_size=200), values.map(lambda value: json.dumps(value).encode())))
def test_any_body_is_answered_or_refused(app: Server, body: bytes) -> None:
    check(exchange(app.app, "POST", CHAT, content=body, headers={"content-type": "application/json"}))
    assert not app.engine.live
