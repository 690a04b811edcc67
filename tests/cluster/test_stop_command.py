"""`tpqwen stop` on a running cluster: what clients, Serve and whoever interrupts it see."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest

from tests.cluster.background import Background
from tests.cluster.clients import Clients, status, streams, tokens_in
from tests.cluster.processes import until
from tests.cluster.replica import SMALL, bound, replicas, start_serve, wait_for_replicas
from tpqwen import stopping
from tpqwen.errors import EngineError

pytestmark = pytest.mark.ray

READY, DRAINING = (200, "ready"), (503, "draining")
SERVED, REFUSED, GONE, NOBODY = (200, ""), (503, "draining again later"), (404, ""), (0, "")


@contextmanager
def application(num_replicas: int) -> Iterator[str]:
    """Served under its URL; with Serve gone at the end."""
    from ray import serve

    url = start_serve()
    ours = bound(SMALL | {"max_model_len": "2048"}, num_replicas=num_replicas)
    serve.run(ours, name="tpqwen", route_prefix="/")
    try:
        yield url
    finally:
        serve.shutdown()
        assert not replicas()


def command(*words: str) -> subprocess.Popen[str]:
    import ray

    address = ray.get_runtime_context().gcs_address
    run = [sys.executable, "-m", "tpqwen.cli", "stop", "--address", address, *words]
    return subprocess.Popen(run, stderr=subprocess.PIPE, text=True)


def running() -> int:
    """Replicas that Serve counts as running."""
    counts = [d.replica_states for d in stopping.applications()["tpqwen"].deployments.values()]
    return sum(n for states in counts for state, n in states.items() if state == "RUNNING")


class Stop(Background):
    """`tpqwen.stop` in this process, which needs no second to start."""

    def __init__(self, **options: Any) -> None:
        super().__init__(partial(self._run, options))
        self.lines: list[str] = []
        self.failure: BaseException | None = None
        self.ended = threading.Event()

    def _run(self, options: dict[str, Any]) -> None:
        try:
            stopping.stop("tpqwen", say=self.lines.append, **options)
        except BaseException as error:
            self.failure = error
        self.ended.set()


def test_every_replica_refuses_what_is_new_until_the_rest_has_ended_and_an_interrupt_takes_that_back(ray_cluster):
    with application(2) as url, Clients(url) as clients:
        began = time.monotonic()
        refused = command("--name", "other")
        assert "no application 'other' of tpqwen there; it runs: tpqwen" in refused.communicate(timeout=60)[1]
        assert refused.returncode == 2
        count = tokens_in(url, 3 * (time.monotonic() - began))  # the command starts while the streams run
        with streams(url, 4, count) as begun:
            first = command()
            until(lambda: [status(url) for _ in range(8)] == [DRAINING] * 8, "both replicas say so", 60)
            first.send_signal(signal.SIGINT)
            said = first.communicate(timeout=60)[1]
            assert (first.returncode, said.splitlines()) == (
                130,
                [
                    "draining 'tpqwen': running requests may end (90 s at most)",
                    "interrupted while 'tpqwen' was being stopped: it will take requests again in a moment",
                ],
            )
            until(lambda: [status(url) for _ in range(8)] == [READY] * 8, "both replicas take requests", 60)
            assert [stream.result()[-1] for stream in begun] == ["[DONE]"] * 4
        with streams(url, 4, count) as begun:
            second = command("--name", "tpqwen")
            until(lambda: DRAINING in [status(url) for _ in range(8)], "the second one goes on", 60)
            assert [stream.result()[-1] for stream in begun] == ["[DONE]"] * 4
            assert second.wait(60) == 0, second.communicate()[1]
        until(lambda: all(told[-1] == NOBODY for told in clients.told.values()), "the port is closed")
    for told in clients.told.values():
        assert told[0] == SERVED
        assert told[-2:] == [REFUSED, NOBODY]
        assert set(told) == {SERVED, REFUSED, NOBODY}, "never 404, which clients take for an answer"


def test_a_replica_that_starts_meanwhile_refuses_and_one_that_dies_is_replaced_by_such_a_one(ray_cluster, monkeypatch):
    monkeypatch.setattr(stopping, "WORD_S", 0.0)
    with application(1) as url:
        with stopping.drained("tpqwen", 60):
            (before,) = wait_for_replicas(1)
            os.kill(before, signal.SIGKILL)
            until(lambda: running() and replicas() not in (set(), {before}), "another replica runs", 120)
            with Clients(url) as clients:
                until(lambda: all(clients.told.values()), "both clients' first answers")
            assert list(clients.told.values()) == [[REFUSED]] * 2
            with pytest.raises(EngineError, match="is being stopped already"):
                stopping.stop("tpqwen")
        until(lambda: status(url) == READY, "it takes requests when nobody stops it any more")
        with streams(url, 1, 1900) as (stream,), stopping.drained("tpqwen", 0.5):
            *_, last = stream.result()
            assert last["error"]["code"] == "draining", "one error event after the grace period, and nothing follows it"
        until(lambda: status(url) == READY, "it takes requests again")
        with Clients(url) as clients, streams(url, 1, 1900) as (stream,), Stop(keep_serve=True) as stop:
            until(lambda: all(told[-1:] == [REFUSED] for told in clients.told.values()), "both clients are refused")
            os.kill(*wait_for_replicas(1), signal.SIGKILL)
            assert stream.exception() is not None, "it is torn"
            assert stop.ended.wait(60)
            assert stop.failure is None
            until(
                lambda: all(told[-1] == GONE for told in clients.told.values()), "Serve is there, the application not"
            )
        for told in clients.told.values():
            assert told[:2] == [SERVED, REFUSED]
            assert told[-2:] == [REFUSED, GONE], "by the replica that Serve has started in the place of the killed one"
            assert SERVED not in told[2:]


@pytest.mark.slow
def test_a_controller_that_is_slow_is_waited_for_and_one_that_is_stuck_is_reported(ray_cluster, monkeypatch):
    import ray

    with application(1) as url:
        controller = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
        pid = ray.get(controller.get_pid.remote())
        monkeypatch.setattr(stopping, "CALL_S", 1.0)
        os.kill(pid, signal.SIGSTOP)
        try:
            with pytest.raises(EngineError, match="nothing has been stopped"):
                stopping.stop("tpqwen")
            assert status(url) == READY
        finally:
            os.kill(pid, signal.SIGCONT)
        until(lambda: stopping.status_of("tpqwen") == "RUNNING", "the controller goes on", 60)
        with streams(url, 1, 1200) as (stream,), Stop() as stop:
            until(lambda: status(url) == DRAINING, "it drains", 60)
            os.kill(pid, signal.SIGSTOP)
            assert stream.result()[-1] == "[DONE]"
            assert not stop.ended.wait(8)  # longer than Serve's own patience with its controller
            assert status(url) == DRAINING
            os.kill(pid, signal.SIGCONT)
            assert stop.ended.wait(60)
        assert (stop.failure, stop.lines[-1:]) == (None, ["stopped 'tpqwen'"])
        assert status(url) == NOBODY
