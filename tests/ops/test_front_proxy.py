"""deploy/nginx.conf with the real nginx in front of a real server. Skipped where nginx is not installed."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.http.live import Live, completion, live, received, until
from tests.http.test_clients import MALFORMED, finished, running, status
from tpqwen.config import Config

ROOT = Path(__file__).resolve().parents[2]
UNSEEN = "/v1/unseen"
CONFIG = ROOT / "deploy/nginx.conf"
NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")

pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed (Debian: apt-get install nginx-light)")


def free_port(address: str) -> int:
    with socket.create_server((address, 0)) as probe:
        return int(probe.getsockname()[1])


@contextmanager
def front(folder: Path, upstream: int, address: str = "127.0.0.1", **changes: str) -> Iterator[int]:
    """nginx with the shipped configuration, but for addresses, and directives that a test must not wait for."""
    text, port = CONFIG.read_text(), free_port(address)
    text = text.replace("server 127.0.0.1:8000;", f"server 127.0.0.1:{upstream};")
    text = text.replace("listen 8080 ", f"listen {address}:{port} ").replace(
        "worker_processes auto", "worker_processes 1"
    )
    for name, value in changes.items():
        text, count = re.subn(rf"^(\s*){name} [^;]+;", rf"\1{name} {value};", text, flags=re.MULTILINE)
        assert count == 1, name
    folder.mkdir(exist_ok=True)
    path = folder / "nginx.conf"
    path.write_text(text)
    user = "user root; " if os.geteuid() == 0 else ""
    words = [str(NGINX), "-p", str(folder), "-c", str(path), "-g", f"{user}daemon off;"]
    subprocess.run([*words, "-t"], check=True, capture_output=True, timeout=20)
    with subprocess.Popen(words, stderr=subprocess.DEVNULL) as process:
        try:
            until(lambda: answers(address, port))
            yield port
        finally:
            process.terminate()
            process.wait(timeout=20)


def answers(address: str, port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((address, port)) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nginx")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Live]:
    """A server that is reached through the proxy only."""
    short = {"client_header_timeout": "1s", "client_body_timeout": "1s", "limit_conn": "connections 20"}
    with live(drop_client_after_s=1.0, comment_every_s=0.5) as here, front(folder, here.port, **short) as port:
        here.port = port
        yield here


def nothing_unseen_arrived(server: Live) -> bool:
    """Whether no request to UNSEEN, which is no route of the server, has come through the proxy."""
    return all(route != "other" for route, *_ in server.hooks.named("http"))


def code(answer: httpx.Response) -> str:
    """Of an error in OpenAI's shape."""
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert answer.headers["content-type"] == "application/json"
    return str(error["code"])


def test_requests_streams_and_errors_of_the_server_pass_as_they_are(server: Live) -> None:
    server.still_serves()
    body = {"prompt": "hi", "max_tokens": 5, "ignore_eos": True, "stream": True}
    streamed = httpx.post(f"{server.url}/v1/completions", json=body, timeout=20)
    assert streamed.text.endswith("data: [DONE]\n\n")
    refused = httpx.post(f"{server.url}/v1/completions", json={"prompt": "hi", "foo": 1})
    assert (refused.status_code, code(refused)) == (400, "unknown_parameter")
    missing = httpx.get(f"{server.url}/v1/models/other")
    assert (missing.status_code, code(missing)) == (404, "model_not_found")


def test_each_event_goes_out_when_it_comes(server: Live) -> None:
    with server.connect() as client:
        client.sendall(completion(max_tokens=20_000, stream=True))
        data = b""
        while data.count(b"data: ") < 3:
            data += client.recv(4096)
        assert running(server) == 1  # far from its end
    server.until_idle()


def test_serves_own_headers_and_routes_do_not_get_through(server: Live) -> None:
    headers = {"x-request-timeout-seconds": "0", "x-request-disconnect-disabled": "?1"}
    answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", "max_tokens": 1}, headers=headers)
    assert answer.status_code == 200  # the server itself would have answered 400
    for path in ("/-/routes", "/-/healthz", "/metrics", "/%2d/routes", "//-/routes", "/v1/../-/routes"):
        answer = httpx.get(f"{server.url}{path}")
        assert (answer.status_code, code(answer)) == (404, "not_found"), path


def test_other_methods_end_at_the_proxy(server: Live) -> None:
    for method in ("DELETE", "PUT", "OPTIONS", "PATCH"):
        answer = httpx.request(method, f"{server.url}/v1/models")
        assert (answer.status_code, code(answer)) == (405, "method_not_allowed")


def test_large_bodies_and_headers_are_refused_before_the_server_sees_them(server: Live) -> None:
    body = httpx.post(f"{server.url}{UNSEEN}", content=b"{" * 5_000_000)
    assert (body.status_code, code(body)) == (413, "request_too_large")
    for headers in ({"x-large": "a" * 10_000}, {f"x-{i}": "a" * 20 for i in range(5000)}, {"x": "a" * 10_000_000}):
        assert _headers_refused(server, headers)
    path = httpx.get(f"{server.url}/{'a' * 10_000}")
    assert (path.status_code, code(path)) == (431, "headers_too_large")
    assert nothing_unseen_arrived(server)
    server.still_serves()


def _headers_refused(server: Live, headers: dict[str, str]) -> bool:
    try:
        answer = httpx.get(f"{server.url}{UNSEEN}", headers=headers)
    except (httpx.WriteError, httpx.ReadError):  # the proxy closed while ten megabytes were still on their way
        return True
    return (answer.status_code, code(answer)) == (431, "headers_too_large")


@pytest.mark.parametrize("part", ["request line", "headers", "body"])
def test_slow_writers_are_cut_off_and_cost_the_server_nothing(server: Live, part: str) -> None:
    whole = completion().replace(b"/v1/completions", UNSEEN.encode())
    end = {"request line": 10, "headers": 40, "body": len(whole) - 5}[part]
    with server.connect() as client:
        client.sendall(whole[:end])
        answer = received(client)
    assert not answer or (status(answer) == 408 and b'"code":"body_timeout"' in answer)
    assert nothing_unseen_arrived(server)
    server.still_serves()


def test_a_client_that_leaves_frees_its_pages_through_the_proxy(server: Live) -> None:
    with server.connect() as client:
        client.sendall(completion(max_tokens=30_000, stream=True))
        until(lambda: running(server) == 1)
    server.until_idle()
    assert finished(server)[-1] == "abort"


def test_a_client_that_reads_nothing_is_ended_through_the_proxy(server: Live) -> None:
    with server.connect(receive_buffer=4096) as client:
        client.sendall(completion(max_tokens=30_000, stream=True))
        until(lambda: running(server) == 1)
        server.until_idle()
        assert finished(server)[-1] in ("abort", "error")


def test_too_many_connections_of_one_address_are_a_429_and_the_others_go_on(server: Live) -> None:
    streams = [server.connect() for _ in range(20)]
    for client in streams:
        client.sendall(completion(max_tokens=20_000, stream=True))
    until(lambda: running(server) == 16)  # the engine's slots; the others wait
    refused = httpx.get(f"{server.url}/v1/models")
    assert (refused.status_code, code(refused), refused.headers["retry-after"]) == (429, "concurrency", "1")
    for client in streams:
        client.close()
    server.until_idle()
    until(lambda: httpx.get(f"{server.url}/v1/models").status_code == 200)


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_http_ends_at_the_proxy_with_one_answer_at_most(server: Live, name: str) -> None:
    before = len(server.hooks.named("finished"))
    with server.connect() as client:
        client.sendall(MALFORMED[name])
        client.shutdown(socket.SHUT_WR)
        answer = received(client)
    assert answer.count(b"HTTP/1.1") <= 1, "a second request was smuggled in"
    assert not answer.startswith(b"HTTP/1.1 2") and b"HTTP/1.1 5" not in answer
    assert len(server.hooks.named("finished")) == before
    server.still_serves()


def test_without_a_server_behind_it_the_answer_is_a_503_to_be_retried(tmp_path: Path) -> None:
    with front(tmp_path / "alone", free_port("127.0.0.1")) as port:
        answer = httpx.get(f"http://127.0.0.1:{port}/v1/models")
    assert (answer.status_code, code(answer), answer.headers["retry-after"]) == (503, "unavailable", "2")


def test_an_answer_that_is_not_streamed_may_take_as_long_as_the_server_lets_it() -> None:
    (seconds,) = re.findall(r"proxy_read_timeout (\d+)s;", CONFIG.read_text())
    assert int(seconds) > Config.load({}, {}).server.total_timeout


def test_an_answer_that_takes_longer_is_a_504_that_is_not_to_be_retried_at_once(tmp_path: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        front(tmp_path / "slow", silent.getsockname()[1], proxy_read_timeout="1s") as port,
    ):
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json={"prompt": "hi"}, timeout=20)
    assert (answer.status_code, code(answer)) == (504, "deadline_exceeded")
    assert "retry-after" not in answer.headers


def test_its_log_holds_neither_keys_nor_queries_nor_prompts(server: Live, folder: Path) -> None:
    headers = {"authorization": "Bearer canarykey", "user-agent": "canaryagent", "referer": "canaryreferer"}
    body = {"prompt": "canaryprompt", "max_tokens": 1}
    assert httpx.post(f"{server.url}/v1/completions?canaryquery=1", json=body, headers=headers).status_code == 200
    log = folder / "access.log"
    until(lambda: "/v1/completions 200" in log.read_text())
    assert "canary" not in log.read_text() + (folder / "error.log").read_text(errors="replace")


def test_every_error_that_nginx_makes_itself_is_json() -> None:
    text = CONFIG.read_text()
    bodies = re.findall(r"return (\d+) '(.+)';", text)
    assert len(bodies) == 9
    for _, body in bodies:
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
