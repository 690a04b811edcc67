"""Ends an application of ours on a running Ray cluster, and lets its clients' requests end before.

Serve has no state between serving and gone: what it is told to delete is a 404 of its proxies at once. So the replicas
are asked to drain first (`draining.py`), and Serve is told when nothing is open any more. Whoever is interrupted before
that leaves the application as it was.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from tpqwen.draining import NAMESPACE
from tpqwen.errors import ConfigError, EngineError

DEPLOYMENT = "Qwen3Server"
GRACE_S = 90.0  # running requests may go on for so long
GONE = "gone"
SERVING = ("RUNNING", "UNHEALTHY")  # an application's states once it has taken requests
POLL_S = 0.2
CALL_S = 40.0  # for Serve's controller, or a replica, to answer; `serve.shutdown` takes up to 35 s
PROXY_S = 0.5  # for what is answered to pass through the proxy, before Serve ends with it
UNDER_WAY_S = 2.0  # for a question to end before an interrupted process leaves Ray: Serve would connect for it again
END_S = 120.0  # for Serve to end what it was told to end: longer than its patience with a replica (90)
KNOCK_S = 10.0  # for the cluster to take a connection
WORD_S = 10.0  # for Ray to notice that whoever gave the word before is dead

NO_TOKEN = "it may want a token (RAY_AUTH_TOKEN_PATH), and what tpqwen serve runs by itself ends with Ctrl-C there"
FAILURES = (RayError, RayServeException, TimeoutError)  # of whatever Serve is asked

T = TypeVar("T")
_log = logging.getLogger(__name__)


def stop(
    name: str | None = None,
    *,
    address: str = "auto",
    timeout_s: float = GRACE_S,
    keep_serve: bool = False,
    say: Callable[[str], None] = _log.info,
) -> None:
    """End an application on a running cluster: new requests are answered 503 `draining` by every replica until the
    running ones have ended, or have got an error after timeout_s; then it is deleted, and Serve is shut down with it if
    nothing else runs there (its port then refuses connections, where it would answer 404).

    name: the application's; the only one of ours when it is None. address: the cluster, where this process is not
    connected to one yet. keep_serve: Serve stays. say: gets a line about each stage. Interrupted (KeyboardInterrupt)
    before Serve was told it leaves the application serving as before. Raises ConfigError when there is nothing to stop,
    EngineError when Serve does not do as it is told.
    """
    if not ray.is_initialized():
        connect(address)
    name = find(name)
    told = False
    try:
        with drained(name, timeout_s, say):
            time.sleep(PROXY_S)
            whole = not keep_serve and is_alone(name)
            told = True
            end(name, whole=whole)
    except KeyboardInterrupt:
        after = "Serve has been told to end it" if told else "it will take requests again in a moment"
        say(f"interrupted while {name!r} was being stopped: {after}")
        raise
    say(f"stopped {name!r}")


def connect(address: str) -> None:
    """This process becomes a driver of the cluster. Raises ConfigError where there is none."""
    host, _, port = address.rpartition(":")
    try:
        if port.isdecimal():  # Ray itself knocks for minutes where nobody listens
            socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_S).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, RayError) as error:
        reason = str(error).strip().partition("\n")[0]
        if reason.startswith("Failed to connect") and not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
            reason = f"{reason.rstrip('.')}; {NO_TOKEN}"
        raise ConfigError(f"there is no Ray cluster at {address}: {reason}") from None


def find(name: str | None) -> str:
    """The application that is meant. Raises ConfigError when it is not there, EngineError when Serve does not say."""
    try:
        found = applications()
    except FAILURES as error:
        reason = str(error).partition("\n")[0] or f"no answer within {CALL_S:g} s"
        raise EngineError(f"Serve does not say what runs there ({reason}); nothing has been stopped") from None
    ours = sorted(app for app, status in found.items() if DEPLOYMENT in status.deployments)
    if name is None and len(ours) == 1:
        return ours[0]
    if name is None and ours:
        raise ConfigError(f"--name must say which of the applications is meant: {', '.join(ours)}")
    if name is None or name not in ours:
        known, text = ", ".join(sorted(found)) or "none", f" {name!r}" if name else ""
        raise ConfigError(f"Serve runs no application{text} of tpqwen there; it runs: {known}")
    return name


def applications() -> dict[str, Any]:
    """What Serve says of each of its applications, by name; none where it does not run. Raises TimeoutError."""
    return dict(within(CALL_S, lambda: serve.status().applications))


@contextmanager
def drained(name: str, grace_s: float, say: Callable[[str], None] = _log.info) -> Iterator[None]:
    """The block begins when no request of the application is open any more. From now to its end no replica takes any,
    nor does one that Serve starts anew; an application that is still there then takes requests again.

    What is open after grace_s ends with an error. A replica that does not answer is not waited for much longer.
    Raises EngineError when somebody else stops the application.
    """
    word = give_word(name)
    try:
        say(f"draining {name!r}: running requests may end ({grace_s:g} s at most)")
        deadline = time.monotonic() + grace_s + CALL_S
        while not is_quiet(name, grace_s):
            if time.monotonic() > deadline:
                say(f"not every replica of {name!r} has said that it is done; this is not waited for any longer")
                break
            time.sleep(POLL_S)
        yield
    finally:
        with suppress(RayError):
            ray.kill(word)


def give_word(name: str) -> Any:
    """What replicas look up to know that their application is being stopped: a named actor, which Ray ends with this
    process, however that ends. Raises EngineError when somebody else has given it."""

    class Word:  # within a function, so that it needs no module of ours where Ray starts it
        """It only has to live."""

    options = {"name": name, "namespace": NAMESPACE, "num_cpus": 0, "max_restarts": -1}
    deadline = time.monotonic() + WORD_S
    while True:
        try:
            return ray.remote(Word).options(**options).remote()
        except ValueError:
            if time.monotonic() > deadline:
                raise EngineError(f"{name!r} is being stopped already, by another process") from None
            time.sleep(POLL_S)


def is_quiet(name: str, grace_s: float) -> bool:
    """Ask every running replica to drain. Whether all have answered, and have nothing open.

    Those that start are not asked: they look for the word before they take requests. Where they replace all that ran
    they are waited for, since Serve keeps requests for them, which would wait for ever. Those that Serve is ending
    cannot be asked, but are waited for. Whatever goes wrong is no answer.
    """
    try:
        status = applications().get(name)
        if status is None:
            return True
        counts = Counter[str]()
        for deployment in status.deployments.values():
            counts.update(deployment.replica_states)
        starting = counts.pop("STARTING", 0)
        if not counts.total():
            return not starting or status.status.value not in SERVING
        answers: list[Any] = within(CALL_S, lambda: ask(name, grace_s))
    except FAILURES as error:  # a controller that is away, a replica that has just died
        _log.debug("not every replica has answered: %r", error)
        return False
    return len(answers) >= counts.total() and all(answer == 0 for answer in answers)


def ask(name: str, grace_s: float) -> list[Any]:
    """What each running replica answers: how many requests are open, or an exception."""
    answers: list[Any] = (
        serve.get_app_handle(name).broadcast("drain", grace_s).results(timeout_s=CALL_S, return_exceptions=True)
    )
    return answers


def is_alone(name: str) -> bool:
    """Whether Serve runs nothing else. Not known counts as no."""
    try:
        return set(applications()) <= {name}
    except FAILURES:
        return False


def end(name: str, *, whole: bool) -> None:
    """Have Serve delete the application, or end itself as a whole, and wait until it has. Raises EngineError.

    Serve is told again as long as it does not say that it is at it: `serve.shutdown` gives up silently when the
    controller does not answer within 5 s.
    """
    status, deadline = "", time.monotonic() + END_S
    while status != GONE:
        if time.monotonic() > deadline:
            raise EngineError(f"Serve was told to end {name!r} and has not done it after {END_S:g} s")
        if status != "DELETING":
            with suppress(*FAILURES):
                within(CALL_S, serve.shutdown if whole else partial(serve.delete, name, _blocking=False))
        status = status_of(name)
        time.sleep(POLL_S if status != GONE else 0.0)


def status_of(name: str) -> str:
    """Serve's word for the application's state; GONE, or empty when Serve does not say."""
    try:
        found = applications().get(name)
    except FAILURES:
        return ""
    return GONE if found is None else str(found.status.value)


def within(timeout_s: float, call: Callable[[], T]) -> T:
    """What the call gives. Raises TimeoutError when that takes too long: Serve itself waits for its controller without
    limit. The thread is left alone then."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        return future.result(timeout_s)
    except KeyboardInterrupt:
        thread.join(UNDER_WAY_S)
        raise
