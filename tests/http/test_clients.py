"""Clients over real sockets: those that leave, read slowly or not at all, write slowly, or speak no HTTP."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.http.live import Live, completion, live, received, until
from tpqwen.engine import client as engine_client


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live(body_timeout_s=1.0) as here:
        yield here


def status(answer: bytes) -> int:
    assert answer.startswith(b"HTTP/1.1 "), answer[:200]
    return int(answer.split(b" ", 2)[1])


def finished(server: Live) -> list[str]:
    return [sequence.reason for (sequence,) in server.hooks.named("finished")]


def running(server: Live) -> int:
    return server.last.num_running if server.last is not None else 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_pages_at_once(server: Live, stream: bool) -> None:
    client = server.connect()
    client.sendall(completion(max_tokens=30_000, stream=stream))
    until(lambda: running(server) == 1)
    client.close()
    server.until_idle()
    until(lambda: ("/v1/completions", "POST", 499) in server.hooks.named("http"))
    assert finished(server)[-1] == "abort"
    server.still_serves()


def test_a_client_that_resets_the_connection_leaves_too(server: Live) -> None:
    client = server.connect()
    client.sendall(completion(max_tokens=30_000, stream=True))
    until(lambda: running(server) == 1)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    client.close()
    server.until_idle()
    server.still_serves()


def test_a_client_that_has_shut_its_writing_side_is_gone(server: Live) -> None:
    """HTTP/1.1 servers take a half-closed connection for a client that left; so do uvicorn and HAProxy."""
    client = server.connect()
    client.sendall(completion(max_tokens=30_000, stream=True))
    until(lambda: running(server) == 1)
    client.shutdown(socket.SHUT_WR)
    server.until_idle()
    client.close()


def test_clients_that_read_nothing_are_dropped_and_others_do_not_notice() -> None:
    with live(step_s=0.0, drop_client_after_s=0.5, comment_every_s=0.2) as server:
        silent = [server.connect(receive_buffer=4096) for _ in range(8)]
        for client in silent:
            client.sendall(completion(max_tokens=30_000, stream=True))
        until(lambda: running(server) == 8)
        answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "hi", "max_tokens": 50}, timeout=30)
        assert answer.status_code == 200
        server.until_idle()
        reasons = finished(server)
        assert reasons.count("abort") == 8  # none of them got to its end
        for client in silent:
            assert b"[DONE]" not in received(client)
            client.close()


def test_a_client_too_many_tokens_behind_is_ended_however_patient_the_server_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_client, "MAX_UNREAD", 300)
    with live(step_s=0.0005, drop_client_after_s=600.0) as server:
        client = server.connect(receive_buffer=65536)
        client.sendall(completion(max_tokens=30_000, stream=True, close=True))
        until(lambda: running(server) == 1)
        server.until_idle()
        answer = received(client)
        client.close()
        assert b'"code":"client_too_slow"' in answer and b"[DONE]" not in answer
        assert finished(server) == ["error"]
        until(lambda: ("/v1/completions", "POST", 499) in server.hooks.named("http"))
        server.still_serves()


def test_a_slow_reader_that_keeps_reading_gets_everything() -> None:
    with live(step_s=0.001, drop_client_after_s=5.0) as server:
        client = server.connect(receive_buffer=4096)
        client.sendall(completion(max_tokens=400, stream=True))
        data = b""
        while not data.endswith(b"0\r\n\r\n"):
            chunk = client.recv(512)
            assert chunk, "cut"
            data += chunk
            time.sleep(0.0005)
        client.close()
        texts = [json.loads(line[6:])["choices"] for line in data.split(b"\n") if line.startswith(b"data: {")]
        assert sum(choices[0]["text"].count("a") for choices in texts if choices) == 400
        assert b"data: [DONE]" in data


def test_a_body_that_does_not_come_to_its_end_is_given_up(server: Live) -> None:
    client = server.connect()
    client.sendall(completion()[:-5])
    answer = received(client)
    client.close()
    assert status(answer) == 408 and b'"code":"body_timeout"' in answer and b"connection: close" in answer.lower()
    server.still_serves()


def test_a_body_in_one_byte_chunks_is_an_ordinary_body(server: Live) -> None:
    data = json.dumps({"prompt": "a" * 3000, "max_tokens": 2}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    client = server.connect()
    client.sendall(
        head + b"Transfer-Encoding: chunked\r\n\r\n" + b"".join(b"1\r\n%c\r\n" % b for b in data) + b"0\r\n\r\n"
    )
    assert status(received(client)) == 200
    client.close()


def test_pipelined_requests_are_answered_in_order(server: Live) -> None:
    client = server.connect()
    get = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"
    last = b"GET /nothing HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    client.sendall(completion(max_tokens=2) + get + completion(max_tokens=0) + get + last)
    answer = received(client)
    client.close()
    codes = [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:]]
    assert codes == [200, 200, 400, 200, 404]
    server.still_serves()


def test_oversized_headers_and_bodies_are_refused(server: Live) -> None:
    for headers, code in (
        ({"x-large": "a" * 17_000}, "headers_too_large"),
        ({f"x-{i}": "a" for i in range(5000)}, "headers_too_large"),
    ):
        answer = httpx.get(f"{server.url}/v1/models", headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (431, code)
    client = server.connect()
    client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
    client.sendall(b"Content-Length: 5000000\r\n\r\n{")
    answer = received(client)  # at once and with the body unread
    assert status(answer) == 413 and b"connection: close" in answer.lower()
    client.close()
    server.still_serves()


MALFORMED = {
    "no http": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 50,
    "wrong version": b"GET /v1/models HTTP/9.9\r\nHost: x\r\n\r\n",
    "space in a header's name": b"GET /v1/models HTTP/1.1\r\nHost : x\r\n\r\n",
    "nul in a header": b"GET /v1/models HTTP/1.1\r\nHost: x\0y\r\n\r\n",
    "length that is no number": b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1x\r\n\r\na",
    "negative length": b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\na",
    "two lengths": b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    "length and chunks": b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /health HTTP/1.1\r\nHost: x\r\n\r\n",
    "chunk that is no number": b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n",
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_http_is_refused_and_its_connection_closed(server: Live, name: str) -> None:
    before = len(server.hooks.named("finished"))
    client = server.connect()
    client.sendall(MALFORMED[name])
    client.shutdown(socket.SHUT_WR)
    answer = received(client)
    client.close()
    assert not answer or status(answer) in (400, 408, 505), answer
    assert answer.count(b"HTTP/1.1") <= 1, "a second request was smuggled in"
    assert len(server.hooks.named("finished")) == before
    server.still_serves()
