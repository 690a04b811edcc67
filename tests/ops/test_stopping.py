"""`tpqwen stop` against a Serve that is played: what is asked in which order, and what becomes of failures."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, GetTimeoutError
from ray.serve.exceptions import RayServeException

import tpqwen
from tpqwen import cli, draining, stopping
from tpqwen.console import stop as command
from tpqwen.errors import ConfigError, EngineError

GRACE = "broadcast drain 90"


def application(*, deployment: str = "Qwen3Server", status: str = "RUNNING", **states: int) -> SimpleNamespace:
    """As Serve describes one. states: replicas by state."""
    deployments = {deployment: SimpleNamespace(replica_states=states)}
    return SimpleNamespace(status=SimpleNamespace(value=status), deployments=deployments)


class FakeRay:
    """A cluster that is joined, and a named actor on it."""

    def __init__(self, calls: list[str]) -> None:
        self.calls = calls
        self.taken = 0  # how often the name is still another process's

    def is_initialized(self) -> bool:
        return "join" in self.calls

    def init(self, address: str, **_options: object) -> None:
        self.calls.append("join")

    def remote(self, _cls: type) -> Any:
        return self

    def options(self, **options: Any) -> Any:
        self.calls.append(f"word {options['name']}")
        assert options["namespace"] == draining.NAMESPACE
        return SimpleNamespace(remote=self._make)

    def kill(self, _word: object) -> None:
        self.calls.append("word gone")

    def _make(self) -> object:
        if self.taken:
            self.taken -= 1
            self.calls.pop()
            raise ValueError("the name is taken")
        return object()


class FakeServe:
    """Serve with some applications. answers: of each broadcast in turn, the last one from then on."""

    def __init__(self, calls: list[str], applications: dict[str, SimpleNamespace], *answers: Any) -> None:
        self.calls = calls
        self.applications = applications
        self.answers = list(answers) or [[0]]
        self.ignores = 0  # orders that Serve does not hear
        self.failures: list[Exception] = []  # of the next questions
        self.on_ask: Callable[[], None] = lambda: None

    def status(self) -> SimpleNamespace:
        if self.failures:
            raise self.failures.pop(0)
        return SimpleNamespace(applications=self.applications)

    def get_app_handle(self, name: str) -> Any:
        return SimpleNamespace(broadcast=self._broadcast)

    def delete(self, name: str, _blocking: bool) -> None:
        assert not _blocking
        self._end(f"delete {name}", [name])

    def shutdown(self) -> None:
        self._end("shutdown", list(self.applications))

    def _broadcast(self, method: str, grace_s: float) -> Any:
        self.calls.append(f"broadcast {method} {grace_s:g}")
        self.on_ask()
        return SimpleNamespace(results=self._results)

    def _results(self, timeout_s: float, return_exceptions: bool) -> Any:
        assert return_exceptions
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _end(self, call: str, names: list[str]) -> None:
        self.calls.append(call)
        if self.ignores:
            self.ignores -= 1
            return
        for name in names:
            del self.applications[name]


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeServe]:
    """Puts such a Serve and a Ray in place of the real ones."""

    def play(applications: dict[str, SimpleNamespace], *answers: Any) -> FakeServe:
        calls: list[str] = []
        fake = FakeServe(calls, applications, *answers)
        monkeypatch.setattr(stopping, "serve", fake)
        monkeypatch.setattr(stopping, "ray", FakeRay(calls))
        for name in ("POLL_S", "PROXY_S"):
            monkeypatch.setattr(stopping, name, 0.001)
        return fake

    return play


def test_serve_is_told_only_when_every_replica_has_answered_the_last_request(played):
    lines: list[str] = []
    fake = played({"tpqwen": application(RUNNING=2)}, [3, 1], [1, 0], [0], [0, 0])
    tpqwen.stop(say=lines.append)
    assert fake.calls == ["join", "word tpqwen", *[GRACE] * 4, "shutdown", "word gone"]
    assert lines == ["draining 'tpqwen': running requests may end (90 s at most)", "stopped 'tpqwen'"]


@pytest.mark.parametrize(
    ("others", "keep_serve", "order"),
    [({}, False, "shutdown"), ({}, True, "delete tpqwen"), ({"b": application()}, False, "delete tpqwen")],
)
def test_serve_ends_with_its_last_application_unless_it_is_to_stay(played, others, keep_serve, order):
    fake = played({"tpqwen": application(RUNNING=1), **others})
    stopping.stop("tpqwen", keep_serve=keep_serve)
    assert fake.calls[-2:] == [order, "word gone"]


@pytest.mark.parametrize(
    "failure",
    [
        ActorDiedError(),
        TimeoutError("no answer of the replicas"),
        RayServeException("unavailable"),
        [ActorDiedError(), 0],
        [GetTimeoutError("this one is stuck"), 0],
    ],
)
def test_what_is_no_answer_is_asked_again(played, failure):
    fake = played({"tpqwen": application(RUNNING=2)}, failure, [0, 0])
    stopping.stop("tpqwen")
    assert fake.calls.count(GRACE) == 2


def test_a_replica_that_serve_is_ending_is_waited_for_and_one_that_starts_is_not(played):
    states = {"RUNNING": 1, "STOPPING": 1, "STARTING": 1}
    fake = played({"tpqwen": application(**states)})
    fake.on_ask = lambda: states.update(STOPPING=0) if fake.calls.count(GRACE) == 3 else None
    fake.applications["tpqwen"].deployments["Qwen3Server"].replica_states = states
    stopping.stop("tpqwen")
    assert fake.calls.count(GRACE) == 4


def test_a_replica_that_replaces_the_last_one_is_waited_for_since_requests_wait_for_it(played):
    states = {"STARTING": 1}
    fake = played({"tpqwen": application(status="UNHEALTHY")})
    fake.applications["tpqwen"].deployments["Qwen3Server"].replica_states = states
    looks = iter(range(3))
    status = fake.status

    def look() -> SimpleNamespace:
        if next(looks, None) is None:
            states.update(STARTING=0, RUNNING=1)
        return status()

    fake.status = look
    stopping.stop("tpqwen")
    assert fake.calls == ["join", "word tpqwen", GRACE, "shutdown", "word gone"]


@pytest.mark.parametrize(
    "found", [application(status="DEPLOYING", STARTING=2), application(status="RUNNING"), application(STOPPED=0)]
)
def test_where_no_replica_runs_nobody_is_asked(played, found):
    fake = played({"tpqwen": found})
    stopping.stop("tpqwen")
    assert fake.calls == ["join", "word tpqwen", "shutdown", "word gone"]


def test_a_replica_that_never_answers_is_left_to_serve_after_the_grace_period(played, monkeypatch):
    monkeypatch.setattr(stopping, "CALL_S", 0.2)
    lines: list[str] = []
    fake = played({"tpqwen": application(RUNNING=2)}, [0])
    stopping.stop("tpqwen", timeout_s=0.1, say=lines.append)
    assert "not every replica of 'tpqwen' has said that it is done" in lines[1]
    assert fake.calls[-2:] == ["shutdown", "word gone"]


def test_an_interrupt_leaves_the_application_as_it_was_until_serve_has_been_told(played, monkeypatch):
    lines: list[str] = []
    fake = played({"tpqwen": application(RUNNING=1)}, [1])

    def interrupt(*_args: object, **_options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(stopping, "is_quiet", interrupt)
        with pytest.raises(KeyboardInterrupt):
            stopping.stop("tpqwen", say=lines.append)
    assert fake.calls == ["join", "word tpqwen", "word gone"]
    assert lines[-1] == "interrupted while 'tpqwen' was being stopped: it will take requests again in a moment"
    fake.answers = [[0]]
    monkeypatch.setattr(stopping, "status_of", interrupt)
    with pytest.raises(KeyboardInterrupt):
        stopping.stop("tpqwen", say=lines.append)
    assert fake.calls[-2:] == ["shutdown", "word gone"]
    assert lines[-1] == "interrupted while 'tpqwen' was being stopped: Serve has been told to end it"


def test_serve_is_told_again_when_it_has_not_heard(played):
    fake = played({"tpqwen": application(RUNNING=1)})
    fake.ignores = 2
    stopping.stop("tpqwen")
    assert fake.calls.count("shutdown") == 3


def test_a_serve_that_is_at_it_is_waited_for_but_not_for_ever(played, monkeypatch):
    monkeypatch.setattr(stopping, "END_S", 0.1)
    fake = played({"tpqwen": application(status="DELETING", RUNNING=1)})
    fake.ignores = 1
    with pytest.raises(EngineError, match=r"was told to end 'tpqwen' and has not done it after 0.1 s"):
        stopping.stop("tpqwen")
    assert fake.calls[-2:] == ["shutdown", "word gone"]


def test_a_question_that_fails_on_the_way_is_asked_again(played):
    fake = played({"tpqwen": application(RUNNING=1)})
    fake.on_ask = lambda: fake.failures.extend([ActorDiedError(), TimeoutError()])
    stopping.end("tpqwen", whole=False)
    assert (fake.applications, stopping.status_of("tpqwen")) == ({}, stopping.GONE)
    fake.failures = [ActorDiedError()]
    assert stopping.status_of("tpqwen") == ""
    fake.failures = [ActorDiedError()]
    assert not stopping.is_alone("tpqwen")


def test_what_is_stopped_already_by_a_living_process_is_left_to_it(played, monkeypatch):
    fake = played({"tpqwen": application(RUNNING=1)})
    stopping.ray.taken = 2  # type: ignore[attr-defined]  # by one that has just been killed
    stopping.stop("tpqwen")
    assert fake.applications == {}
    fake = played({"tpqwen": application(RUNNING=1)})
    stopping.ray.taken = 10**9  # type: ignore[attr-defined]
    monkeypatch.setattr(stopping, "WORD_S", 0.0)
    with pytest.raises(EngineError, match="'tpqwen' is being stopped already"):
        stopping.stop("tpqwen")
    assert fake.applications


@pytest.mark.parametrize(
    ("applications", "name", "sentence"),
    [
        ({}, None, "Serve runs no application of tpqwen there; it runs: none"),
        ({"x": application(deployment="Other")}, "x", "Serve runs no application 'x' of tpqwen there; it runs: x"),
        ({"a": application()}, "b", "Serve runs no application 'b' of tpqwen there; it runs: a"),
        ({"b": application(), "a": application()}, None, "--name must say which of the applications is meant: a, b"),
    ],
)
def test_the_application_that_is_meant_must_be_ours_and_there(played, applications, name, sentence):
    fake = played(applications)
    with pytest.raises(ConfigError) as caught:
        stopping.stop(name)
    assert (str(caught.value), fake.calls) == (sentence, ["join"])


@pytest.mark.parametrize("failure", [ActorDiedError(), TimeoutError()])
def test_a_serve_that_does_not_answer_at_all_is_reported_before_anything_is_stopped(played, failure):
    fake = played({"tpqwen": application(RUNNING=1)})
    fake.failures = [failure]
    with pytest.raises(EngineError, match="nothing has been stopped"):
        stopping.stop()
    assert fake.calls == ["join"]


def test_a_call_that_never_returns_is_given_up():
    with pytest.raises(TimeoutError):
        stopping.within(0.01, threading.Event().wait)
    with pytest.raises(ConfigError):
        stopping.within(10, lambda: stopping.find(stopping.within(10, raise_config_error)))
    assert stopping.within(10, lambda: 3) == 3


def raise_config_error() -> str:
    raise ConfigError("as it was raised")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the command asks of `stop`, in place of doing it."""
    found: list[Any] = []
    monkeypatch.setattr(cli, "set_ray_defaults", lambda environ, words: None)
    monkeypatch.setattr(cli.logs, "configure", lambda level, process: None)
    monkeypatch.setattr(command, "connect", found.append)
    monkeypatch.setattr(command.ray, "shutdown", lambda: found.append("left"))
    monkeypatch.setattr(command, "stop", lambda name, say, **options: found.append((name, options)))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return found


def test_the_command_stops_what_its_options_say(asked, monkeypatch):
    assert cli.main(["stop"]) == 0
    assert asked == ["auto", (None, {"timeout_s": 90.0, "keep_serve": False}), "left"]
    asked.clear()
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert cli.main(["stop", "--name", "a", "--timeout", "7", "--keep-serve"]) == 0
    assert asked == ["head:6379", ("a", {"timeout_s": 7.0, "keep_serve": True}), "left"]


@pytest.mark.parametrize("seconds", ["-1", "nan"])
def test_a_time_that_cannot_be_meant_is_refused_before_the_cluster_is_joined(asked, capsys, seconds):
    assert cli.main(["stop", f"--timeout={seconds}"]) == 2
    assert asked == []
    assert capsys.readouterr().err == "tpqwen: --timeout must be 0 or more seconds\n"


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (EngineError("no"), 1), (ConfigError("no"), 2)]
)
def test_however_it_ends_the_command_leaves_the_cluster(asked, monkeypatch, error, code):
    def fail(*_args: object, **_options: object) -> None:
        raise error

    monkeypatch.setattr(command, "stop", fail)
    assert cli.main(["stop"]) == code
    assert asked == ["auto", "left"]


@pytest.mark.parametrize("known", [True, False])
def test_a_cluster_that_wants_a_token_is_named_where_none_is_known(monkeypatch, known):
    def init(**_options: object) -> None:
        raise ConnectionError("Failed to connect to Ray cluster at 127.0.0.1:6379.\nMore lines")

    monkeypatch.setattr(stopping.ray, "init", init)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    if known:
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "file")
    with pytest.raises(ConfigError) as caught:
        stopping.connect("auto")
    text = "; it may want a token (RAY_AUTH_TOKEN_PATH), and what tpqwen serve runs by itself ends with Ctrl-C there"
    assert str(caught.value).endswith("at 127.0.0.1:6379." if known else text)


def test_no_cluster_is_one_sentence(monkeypatch):
    def init(**_options: object) -> None:
        raise ConnectionError("Could not find any running Ray instance.\nMore lines")

    monkeypatch.setattr(stopping.ray, "init", init)
    sentence = r"^there is no Ray cluster at auto: Could not find any running Ray instance.$"
    with pytest.raises(ConfigError, match=sentence):
        stopping.connect("auto")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
        with pytest.raises(ConfigError, match="Could not find any"):
            stopping.connect(f"127.0.0.1:{port}")
    with pytest.raises(ConfigError, match=rf"^there is no Ray cluster at 127.0.0.1:{port}: .*refused"):
        stopping.connect(f"127.0.0.1:{port}")


def test_an_interrupt_lets_the_question_end_that_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, ended = threading.Event(), threading.Event()

    def question() -> None:
        asked.set()
        ended.wait(60)

    def interrupted(_future: Any, _timeout_s: float) -> None:
        assert asked.wait(60)
        threading.Timer(0.05, ended.set).start()
        raise KeyboardInterrupt

    monkeypatch.setattr(stopping.Future, "result", interrupted)
    monkeypatch.setattr(stopping, "UNDER_WAY_S", 60.0)
    with pytest.raises(KeyboardInterrupt):
        stopping.within(60, question)
    assert ended.is_set()
