"""`tpqwen serve` as a process of its own: a signal lets running streams end and tells everybody else why not.

The signal comes to the process alone, as from a pod's kubelet, or to its whole process group, as from a terminal's
Ctrl-C, from `timeout` and from an init that forwards to the group.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.cluster.processes import children_of, title, until

pytestmark = pytest.mark.ray

OPTIONS = ["--device", "cpu", "--threads", "1", "--max-num-seqs", "8", "--max-batched-tokens", "128"]
REQUEST = {"prompt": "one two three", "max_tokens": 1500, "temperature": 0, "ignore_eos": True, "stream": True}


@pytest.fixture
def command(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], str, Path]]:
    """The process, its URL and what it writes."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    log = tmp_path / "log"
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    run = [sys.executable, "-c", "from tpqwen.cli import main; raise SystemExit(main())", "serve", "--port", str(port)]
    with log.open("wb") as output:
        words = [*run, *OPTIONS]
        process = subprocess.Popen(words, stdout=output, stderr=output, env=environment, start_new_session=True)
    yield process, f"http://127.0.0.1:{port}", log
    for _ in range(2):  # a test that failed: end at once, and take Ray along
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            time.sleep(1)
    process.wait(60)


def status(url: str) -> tuple[int, str]:
    try:
        answer = httpx.get(f"{url}/ready", timeout=5)
    except httpx.HTTPError:
        return 0, ""
    return answer.status_code, answer.json()["status"] if answer.status_code in (200, 503) else ""


def to_process(pid: int) -> None:
    os.kill(pid, signal.SIGTERM)


def to_group(pid: int) -> None:
    """To the child, then to its group, as `timeout` does."""
    os.kill(pid, signal.SIGTERM)
    os.killpg(pid, signal.SIGTERM)


def ctrl_c(pid: int) -> None:
    os.killpg(pid, signal.SIGINT)


@pytest.mark.parametrize(
    "stop", [pytest.param(to_process, marks=pytest.mark.slow), to_group, pytest.param(ctrl_c, marks=pytest.mark.slow)]
)
def test_a_signal_drains_before_the_application_goes(command, stop: Callable[[int], None]):
    process, url, log = command
    until(lambda: status(url) == (200, "ready") or process.poll() is not None, "readiness", 150)
    assert process.poll() is None, log.read_text()
    children = children_of({process.pid})
    until(lambda: "tpqwen replica" in map(title, children), "the replica's title")
    with httpx.stream("POST", f"{url}/v1/completions", json=REQUEST, timeout=120) as running:
        lines = (line.removeprefix("data: ") for line in running.iter_lines() if line.startswith("data: "))
        events = [next(lines)]
        stop(process.pid)
        until(lambda: status(url) == (503, "draining"), "/ready says so", 60)
        refused = httpx.post(f"{url}/v1/completions", json=REQUEST, timeout=30)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert "retry-after" in refused.headers
        events += lines
    assert events[-1] == "[DONE]"
    assert [c["finish_reason"] for c in json.loads(events[-2])["choices"]] == ["length"]
    assert process.wait(120) == 0, log.read_text()
    until(lambda: not any(title(pid) for pid in children), "the end of every process")
    with socket.create_server(("127.0.0.1", int(url.rpartition(":")[2]))):
        pass  # nobody listens there any more
    assert not [name for name in os.listdir("/dev/shm") if name.startswith("tpqwen")]
