"""`tpqwen serve` as a user starts it, with both ingresses: it streams, opens what it says, and leaves nothing."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest

from tests.cluster.clients import free_ports
from tests.cluster.processes import children_of, title, until
from tests.cluster.sockets import Listener, listeners, speaks_grpc
from tpqwen.bench.load import Case, Job
from tpqwen.bench.serve import measure
from tpqwen.console.ray_settings import HAPROXY_PORTS

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(200)]

ROOT = Path(__file__).resolve().parents[2]
GROWTH_MIB = 32  # between the first and the third flood, per process
KEY = "tpq_alice_0123456789abcdef"
RAYS = re.compile(r"^ray::|raylet|gcs_server|/ray/dashboard/|/ray/_private/|/ray/autoscaler/")
OURS = re.compile(r"^tpqwen (replica|engine|rank)")


class Running(NamedTuple):
    ingress: str
    port: int
    haproxy: list[int]  # HAPROXY_PORTS, in order
    process: subprocess.Popen[bytes]
    log: Path

    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {KEY}"}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def tree(self) -> set[int]:
        return children_of({self.process.pid})


def is_ready(server: Running) -> bool:
    assert server.process.poll() is None, server.log.read_text()
    try:
        return httpx.get(f"{server.url}/ready", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.fixture(scope="module", params=["serve", "haproxy"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    port, *others = free_ports(1 + len(HAPROXY_PORTS))
    env = {k: v for k, v in os.environ.items() if k not in ("RAY_AUTH_MODE", "RAY_ADDRESS")}
    env |= {name: str(number) for name, number in zip(HAPROXY_PORTS, others, strict=True)}
    env["RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT"] = str(others[-1] + 100)
    env |= {"TPQWEN_API_KEYS": f"alice {KEY}", "PYTHONPATH": str(ROOT)}
    log = tmp_path_factory.mktemp("serve") / "log"
    options = ["--device", "cpu", "--threads", "1", "--port", str(port), "--max-model-len", "512"]
    options += ["--max-num-seqs", "8", "--max-waiting", "16"]
    words = [sys.executable, "-m", "tpqwen.cli", "serve", "--ingress", request.param, *options]
    with log.open("wb") as out, subprocess.Popen(words, env=env, stdout=out, stderr=out) as process:
        here = Running(request.param, port, others, process, log)
        try:
            until(lambda: is_ready(here) and "curl" in log.read_text(), "the banner", 120)
            yield here
        finally:
            process.kill()


def test_it_streams_and_asks_for_keys(server: Running) -> None:
    body = {"prompt": "Hello", "max_tokens": 20, "ignore_eos": True, "stream": True}
    assert httpx.post(f"{server.url}/v1/completions", json=body).status_code == 401
    answer = httpx.post(f"{server.url}/v1/completions", json=body, headers=server.headers(), timeout=60)
    assert answer.status_code == 200
    events = [line[6:] for line in answer.text.split("\n\n") if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["choices"][0]["finish_reason"] == "length"
    assert [name for name in answer.headers if name == "x-request-id"] == ["x-request-id"]
    assert httpx.get(f"{server.url}/-/healthz").text == "success"  # what KubeRay's probe looks for


def test_a_request_has_one_line_in_the_log_and_at_once(server: Running) -> None:
    """Serve's throughput settings lead stderr into a logger that writes its lines, and Serve's own, by the thousand."""
    until(lambda: any(title(pid) == "tpqwen replica" for pid in server.tree()), "it has its title")
    (replica,) = [pid for pid in server.tree() if title(pid) == "tpqwen replica"]
    log = next(file for fd in Path(f"/proc/{replica}/fd").iterdir() if (file := fd.resolve()).suffix == ".err")
    body = {"prompt": "Hello", "max_tokens": 1}
    line = " route=/v1/completions method=POST status=200 "
    before = log.read_text().count(line)
    for expected in (before + 1, before + 2):
        assert httpx.post(f"{server.url}/v1/completions", json=body, headers=server.headers(), timeout=60).is_success
        until(lambda count=expected: log.read_text().count(line) == count, "our line")  # type: ignore[misc]
    (serves,) = (log.parent / "serve").glob("replica_*.log")
    assert "/v1/completions" not in serves.read_text()


def test_a_client_that_leaves_frees_its_pages(server: Running) -> None:
    body = {"prompt": "Hello", "max_tokens": 480, "ignore_eos": True, "stream": True}
    with httpx.stream(
        "POST", f"{server.url}/v1/completions", json=body, headers=server.headers(), timeout=60
    ) as answer:
        next(answer.iter_bytes())

    def metrics() -> str:
        return httpx.get(f"{server.url}/metrics", headers=server.headers(), timeout=10).text

    until(lambda: re.search(r'tpqwen_requests_finished_total\{finish_reason="abort".*\} 1\.0', metrics()), "the abort")
    until(lambda: re.search(r'tpqwen_kv_cache_blocks\{.*state="used"\} 0\.0', metrics()), "no block in use")


def test_a_flood_is_answered_or_refused_in_good_order_and_leaves_no_trace(server: Running) -> None:
    """Far more clients than fit, and who is refused asks again at once: nothing but whole answers and 429s."""
    before = ours(server)
    sizes = []
    for seed in range(3):  # the first brings everything to its working size
        case = Case("closed", 96, 2000, 16, 16)
        done = measure(Job(server.url, "tpqwen-demo", case, 0, 2, seed, 4000, KEY))
        records = [record for part in done for record in part.records]
        assert {r.status for r in records} == {200, 429}
        for record in records:
            if record.status == 200:
                assert record.error is None
            else:
                assert record.error is not None and int(record.retry_after) >= 1
                assert json.loads(record.error.removeprefix("429 "))["error"]["code"] == "queue_full"
        sizes.append({name: rss_mib(pid) for pid, name in ours(server).items()})
    assert ours(server) == before  # no process was replaced
    assert {name: size for name, size in sizes[2].items() if size > sizes[0][name] + GROWTH_MIB} == {}


def ours(server: Running) -> dict[int, str]:
    return {pid: name for pid in server.tree() if OURS.search(name := title(pid))}


def rss_mib(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def test_what_it_opens_is_what_the_banner_and_the_security_page_name(server: Running) -> None:
    found = listeners(server.tree())
    stats, exporter, fallback, replica = server.haproxy
    api = [x for x in found if x.port == server.port]
    assert api and all(x.is_loopback for x in api)
    expected = {stats, exporter} if server.ingress == "haproxy" else set()
    open_to_all = [x for x in found if not x.is_loopback]
    assert [(title(x.pid), x) for x in open_to_all if not is_expected(x, expected)] == []
    assert {x.port for x in open_to_all} >= expected
    banner = server.log.read_text()
    for number in (stats, exporter, fallback, replica):
        assert (f"{number} (" in banner) == (server.ingress == "haproxy")
    if server.ingress == "haproxy":
        assert {x.port for x in found if x.is_loopback} >= {fallback, replica}


def is_expected(listener: Listener, haproxy: set[int]) -> bool:
    """Ray's own; of our processes nothing but Ray's gRPC; of HAProxy nothing but what it is said to open."""
    name = title(listener.pid)
    if OURS.search(name):
        return speaks_grpc(listener.port)
    return listener.port in haproxy if "haproxy" in name and not RAYS.search(name) else bool(RAYS.search(name))


def test_a_signal_ends_it_with_all_its_processes_and_files(server: Running) -> None:
    processes = server.tree()
    folders = {p for p in Path("/tmp").glob("tpqwen-haproxy-*") if server.ingress == "haproxy"}
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(timeout=60) == 0
    until(lambda: not [pid for pid in processes if title(pid)], "the end of its processes", 30)
    assert server.ingress != "haproxy" or any(not folder.exists() for folder in folders)
    assert "Traceback" not in server.log.read_text()
