"""The order in which `tpqwen serve` ends: the replica drains, the application goes, Ray goes."""

from __future__ import annotations

import asyncio
import signal
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from ray._private import services
from ray.exceptions import GetTimeoutError
from rich.console import Console

from tpqwen import draining, ending
from tpqwen.console import serve as command
from tpqwen.console import signals
from tpqwen.console.signals import ECHO_S, Interrupts, sessions_of_their_own
from tpqwen.draining import Drain, end_all
from tpqwen.errors import EngineError
from tpqwen.service import Qwen3Server


def calls_of_the_end(monkeypatch, own_cluster: bool, failure: type[BaseException] | None) -> list[str]:
    """What happens in which order when `tpqwen serve` stops; failure: how the drain ends."""
    calls: list[str] = []

    @contextmanager
    def drained(name: str, grace_s: float):
        calls.append(f"drain {name} within {grace_s:g} s")
        if failure is not None:
            raise failure
        yield
        calls.append("drained no longer")

    monkeypatch.setattr(command, "drained", drained)
    monkeypatch.setattr(command, "end", lambda name, *, whole: calls.append("end Serve" if whole else f"end {name}"))
    monkeypatch.setattr(command, "PROXY_S", 0.0)
    monkeypatch.setattr(command.serve, "delete", lambda name, _blocking: calls.append(f"delete {name} at once"))
    monkeypatch.setattr(command.serve, "status", lambda: None)
    monkeypatch.setattr(command.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(command.ray, "shutdown", lambda: calls.append("shutdown"))
    command.stop(Console(quiet=True), Interrupts(), own_cluster=own_cluster)
    return calls


DRAIN = "drain tpqwen within 90 s"


@pytest.mark.parametrize(
    ("own_cluster", "failure", "expected"),
    [
        (True, None, [DRAIN, "end Serve", "drained no longer", "shutdown"]),
        (False, None, [DRAIN, "end tpqwen", "drained no longer", "shutdown"]),
        (True, EngineError, [DRAIN, "end Serve", "shutdown"]),
        (True, KeyboardInterrupt, [DRAIN, "delete tpqwen at once", "shutdown"]),
    ],
)
def test_the_replica_drains_before_the_application_goes_unless_interrupted(monkeypatch, own_cluster, failure, expected):
    assert calls_of_the_end(monkeypatch, own_cluster, failure) == expected


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

    state = SimpleNamespace(name="ready")

    def __init__(self, stubborn: int) -> None:
        self.draining = False
        self.given_up: list[str] = []
        self._open, self._stubborn = 3, stubborn

    def drain(self) -> None:
        self.draining = True

    def reopen(self) -> None:
        self.draining = False

    def give_up(self, reason: str, code: str) -> None:
        self.given_up.append(f"{code}: {reason}")
        self._open = self._stubborn = 0

    @property
    def num_open(self) -> int:
        assert self.draining, "requests were still taken"
        self._open = max(self._open - 1, self._stubborn)
        return self._open


def drain_of(client: FakeClient, states: list[str]) -> Drain:
    return Drain(client, lambda: 0, "app", states.append)  # type: ignore[arg-type]


@pytest.mark.parametrize(("stubborn", "grace_s", "given_up"), [(0, 60.0, 0), (1, 0.2, 1)])
def test_draining_takes_nothing_new_and_waits_for_what_is_open(monkeypatch, stubborn, grace_s, given_up):
    monkeypatch.setattr(draining, "word_stands", lambda app: True)
    client, states = FakeClient(stubborn), []

    async def main() -> None:
        drain = drain_of(client, states)
        assert drain.begin(grace_s) > 0
        while drain.begin(0.0):  # asked again: the first grace period counts
            await asyncio.sleep(0.01)
        drain.close()

    asyncio.run(main())
    assert states == ["draining"]
    assert client.draining
    assert len(client.given_up) == given_up
    assert all(reason.startswith("draining: the server is shutting down") for reason in client.given_up)


def test_requests_are_taken_again_when_nobody_stops_the_application_any_more(monkeypatch):
    words = iter([True, None, False])  # None: Ray did not say
    monkeypatch.setattr(draining, "word_stands", lambda app: next(words))
    monkeypatch.setattr(draining, "LOOK_S", 0.01)
    client, states = FakeClient(1), []

    async def main() -> None:
        drain = drain_of(client, states)
        drain.begin(0.1)
        while client.draining:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)  # longer than the grace period, which is over with the drain

    asyncio.run(main())
    assert states == ["draining", "ready"]
    assert next(words, None) is None
    assert not client.given_up


@pytest.mark.parametrize(("word", "refuses"), [(True, True), (False, False), (None, False)])
def test_a_replica_that_starts_refuses_where_its_application_is_being_stopped(monkeypatch, word, refuses):
    monkeypatch.setattr(draining, "word_stands", lambda app: word)
    client, states = FakeClient(0), []

    async def main() -> None:
        drain = drain_of(client, states)
        await drain.join()
        drain.close()

    asyncio.run(main())
    assert client.draining == refuses
    assert states == ["draining"] * refuses


@pytest.mark.parametrize(
    ("failure", "stands"), [(None, True), (ValueError("no such actor"), False), (GetTimeoutError("GCS is away"), None)]
)
def test_the_word_stands_as_long_as_ray_knows_it(monkeypatch, failure, stands):
    def get_actor(name: str, namespace: str) -> object:
        assert (name, namespace) == ("app", draining.NAMESPACE)
        if failure is not None:
            raise failure
        return object()

    monkeypatch.setattr(draining.ray, "get_actor", get_actor)
    assert draining.word_stands("app") is stands


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
