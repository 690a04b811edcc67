"""`tpqwen stop` ends what `serve run` has started, in processes of its own, with both ingresses."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.clients import Clients, free_ports, status, streams, tokens_in
from tests.cluster.processes import children_of, title, until
from tpqwen.console.ray_settings import HAPROXY_PORTS, set_ray_defaults

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
SERVED, REFUSED, NOBODY = (200, ""), (503, "draining again later"), (0, "")
CONFIG = """
http_options: {{host: 127.0.0.1, port: {port}}}
applications:
- name: ours
  route_prefix: /
  import_path: serve_app:app
  args: {{device: cpu, threads: "1", max_num_seqs: "8", max_batched_tokens: "128"}}
"""


@pytest.fixture(params=["serve", "haproxy"])
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, str, dict[str, str]]]:
    """The application's URL, its cluster's address and the environment of both, with the cluster's token."""
    port, *others = free_ports(1 + len(HAPROXY_PORTS))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    set_ray_defaults(environment, ["serve", "--ingress", request.param])
    environment |= {name: str(number) for name, number in zip(HAPROXY_PORTS, others, strict=True)}
    environment["RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT"] = str(others[-1] + 100)
    config = tmp_path / "serve.yaml"
    config.write_text(CONFIG.format(port=port))
    with tempfile.TemporaryDirectory(prefix="tpq", dir="/tmp", ignore_cleanup_errors=True) as folder:
        environment["RAY_TMPDIR"] = folder  # short, since sockets lie in it
        words = [str(Path(sys.executable).with_name("serve")), "run", str(config)]
        with (tmp_path / "log").open("wb") as log:
            process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
        url = f"http://127.0.0.1:{port}"
        until(lambda: status(url) == (200, "ready") or process.poll() is not None, "readiness", 150)
        assert process.poll() is None, (tmp_path / "log").read_text()
        found = [re.search(r"--gcs-address=(\S+)", title(pid)) for pid in children_of({process.pid})]
        yield url, next(match[1] for match in found if match), environment
        process.send_signal(signal.SIGINT)
        process.wait(60)


def test_what_serve_run_has_started_is_stopped_without_a_failed_request_and_a_killed_stop_changes_nothing(served):
    url, address, environment = served
    words = [sys.executable, "-m", "tpqwen.cli", "stop", "--address", address]

    def command() -> subprocess.Popen[str]:
        return subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True)

    with Clients(url) as clients:
        count = tokens_in(url, 8)  # a command starts meanwhile
        with streams(url, 2, count) as begun:
            first = command()
            until(lambda: all(told[-1] == REFUSED for told in clients.told.values()), "both clients are refused", 60)
            first.kill()
            first.communicate()
            until(lambda: all(told[-1] == SERVED for told in clients.told.values()), "both clients are served again")
            assert [stream.result()[-1] for stream in begun] == ["[DONE]"] * 2
        with streams(url, 2, count) as begun:
            second = command()
            assert [stream.result()[-1] for stream in begun] == ["[DONE]"] * 2
            said = second.communicate(timeout=120)[1]
        assert second.returncode == 0, said
        assert said.splitlines()[-1] == "stopped 'ours'"
        until(lambda: all(told[-1] == NOBODY for told in clients.told.values()), "the port is closed")
    for told in clients.told.values():
        assert told == [SERVED, REFUSED, SERVED, REFUSED, NOBODY]
