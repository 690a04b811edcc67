"""The order in which `tpqwen serve` ends: the replica drains, the application goes, Ray goes."""

from __future__ import annotations

import asyncio
import signal
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from ray._private import services
from rich.console import Console

from tpqwen import ending
from tpqwen.console import serve as command
from tpqwen.console import signals
from tpqwen.console.signals import ECHO_S, Interrupts, sessions_of_their_own
from tpqwen.service import Qwen3Server, end_all


class FakeServe:
    """Ray Serve with one application; calls are recorded in order."""

    def __init__(self, status: str, failure: type[BaseException] | None = None) -> None:
        self.calls: list[str] = []
        self._status = status
        self._failure = failure

    def status(self) -> Any:
        return SimpleNamespace(applications={"tpqwen": SimpleNamespace(status=SimpleNamespace(value=self._status))})

    def get_app_handle(self, name: str) -> Any:
        return SimpleNamespace(drain=SimpleNamespace(remote=self._asked))

    def _asked(self, grace_s: float) -> Any:
        self.calls.append(f"drain within {grace_s:g} s")
        return SimpleNamespace(result=self._drained)

    def _drained(self, timeout_s: float) -> None:
        assert timeout_s > command.DRAIN_S
        if self._failure is not None:
            raise self._failure

    def shutdown(self) -> None:
        self.calls.append("end Serve")

    def delete(self, name: str, _blocking: bool = True) -> None:
        self.calls.append(f"delete {name}" if _blocking else f"delete {name} without waiting")


DRAIN = "drain within 90 s"


@pytest.mark.parametrize(
    ("own_cluster", "status", "failure", "expected"),
    [
        (True, "RUNNING", None, [DRAIN, "end Serve", "shutdown"]),
        (False, "RUNNING", None, [DRAIN, "delete tpqwen", "shutdown"]),
        (True, "RUNNING", TimeoutError, [DRAIN, "end Serve", "shutdown"]),
        (True, "RUNNING", KeyboardInterrupt, [DRAIN, "delete tpqwen without waiting", "shutdown"]),
        (False, "DEPLOYING", None, ["delete tpqwen", "shutdown"]),
    ],
)
def test_the_replica_drains_before_the_application_goes_unless_interrupted(
    monkeypatch, own_cluster, status, failure, expected
):
    fake = FakeServe(status, failure)
    monkeypatch.setattr(command, "serve", fake)
    monkeypatch.setattr(command, "PROXY_S", 0.0)
    monkeypatch.setattr(command.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(command.ray, "shutdown", lambda: fake.calls.append("shutdown"))
    command.stop(Console(quiet=True), Interrupts(), own_cluster=own_cluster)
    assert fake.calls == expected


def test_a_signal_interrupts_once_and_its_echo_does_nothing():
    now = [100.0]
    before = signal.getsignal(signal.SIGTERM)
    with Interrupts(lambda: now[0]) as interrupts:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
        now[0] += ECHO_S
        signal.signal(signal.SIGTERM, before)  # as Ray does
        interrupts.take()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        now[0] += ECHO_S
        interrupts.ignore()
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_ray_starts_has_a_session_of_its_own():
    popen = services.ConsolePopen
    words = [sys.executable, "-c", "import os; raise SystemExit(os.getsid(0) != os.getpid())"]
    with sessions_of_their_own():
        started = services.start_ray_process(words, "test", fate_share=True)
    assert started.process.wait(30) == 0
    assert services.ConsolePopen is popen


def test_what_would_not_end_with_us_stays_in_our_session(monkeypatch):
    popen = services.ConsolePopen
    monkeypatch.setattr(signals, "detect_fate_sharing_support", lambda: None)
    with sessions_of_their_own():
        assert services.ConsolePopen is popen


class FakeClient:
    """Three requests are open, and one ends at each look, except for the last so many; these end when given up."""

    def __init__(self, stubborn: int) -> None:
        self.draining = False
        self.given_up: list[str] = []
        self._open, self._stubborn = 3, stubborn

    def drain(self) -> None:
        self.draining = True

    def give_up(self, reason: str, code: str) -> None:
        self.given_up.append(f"{code}: {reason}")
        self._open = self._stubborn = 0

    @property
    def num_open(self) -> int:
        assert self.draining, "requests were still taken"
        self._open = max(self._open - 1, self._stubborn)
        return self._open


@pytest.mark.parametrize(("stubborn", "grace_s", "given_up"), [(0, 60.0, 0), (1, 0.2, 1)])
def test_draining_takes_nothing_new_and_waits_for_what_is_open(stubborn, grace_s, given_up):
    client, states = FakeClient(stubborn), []
    metrics = SimpleNamespace(engine_state=states.append)
    replica = SimpleNamespace(_client=client, _answering=lambda: 0, _metrics=metrics)
    asyncio.run(Qwen3Server.func_or_class.drain(replica, grace_s))
    assert states == ["draining"]
    assert client._open == 0
    assert len(client.given_up) == given_up
    assert all(reason.startswith("draining: the server is shutting down") for reason in client.given_up)


def test_an_answer_that_is_still_being_written_is_waited_for():
    client, counts = FakeClient(0), iter([2, 1, 1, 0])
    client.draining = True
    asyncio.run(end_all(client, lambda: next(counts), 60.0))
    assert next(counts, None) is None
    assert not client.given_up


def test_when_serves_patience_is_over_late_requests_are_refused_before_the_others_are_given_up():
    """They would be torn with the replica."""
    calls: list[str] = []

    class Late(SimpleNamespace):
        num_open = 1

        def drain(self) -> None:
            calls.append("drain")

        def give_up(self, reason: str, code: str) -> None:
            calls.append(code)
            self.num_open = 0

    asyncio.run(end_all(Late(), lambda: 0, 0.0))
    assert calls == ["drain", "draining"]


@pytest.mark.parametrize("actors", [{}, {"id": SimpleNamespace(_replica_impl=SimpleNamespace())}])
def test_a_serve_that_looks_otherwise_costs_a_warning_and_nothing_else(monkeypatch, caplog, actors):
    monkeypatch.setattr(ending, "global_worker", SimpleNamespace(actors=actors))
    replica = SimpleNamespace(_client=FakeClient(0), _answering=lambda: 0)
    asyncio.run(Qwen3Server.func_or_class._end_in_time(replica))
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "torn" in caplog.text
    assert not replica._client.given_up
