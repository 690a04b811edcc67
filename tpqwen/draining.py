"""How a replica drains: it takes nothing new, and what is open ends by itself, or with an error when it takes too long.

Whoever stops an application (`stopping.py`) gives a word that all replicas can look up, those that start later too. It
stands as long as that process lives and holds it. When it is gone and the application is not, the replica takes
requests again: one that refuses everybody and that nobody stops would be worse than one that runs on.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import ray
from ray.exceptions import RayError

from tpqwen.engine.client import EngineClient

NAMESPACE = "tpqwen-stop"  # of the Ray actors that are the words; each has its application's name
COUNT_S = 0.05  # between two counts of what is open
LOOK_S = 1.0  # between two looks at the word
FLUSH_S = 5.0  # for clients to read how their requests ended

_log = logging.getLogger(__name__)


def word_stands(app: str) -> bool | None:
    """Whether somebody stops this application; None when Ray does not say. A call to Ray's GCS, milliseconds."""
    try:
        ray.get_actor(app, namespace=NAMESPACE)
    except ValueError:
        return False
    except RayError as error:
        _log.warning("not known whether this application is being stopped: %s", error)
        return None
    return True


async def none_left(count: Callable[[], int], timeout_s: float) -> bool:
    """Wait until there is nothing to count, timeout_s at most; whether it is so."""
    deadline = time.monotonic() + timeout_s
    while count():
        if time.monotonic() >= deadline:
            return False
        await asyncio.sleep(COUNT_S)
    return True


async def end_all(client: EngineClient, answering: Callable[[], int], grace_s: float) -> None:
    """Wait until no request is open; what still is after grace_s ends with an error, and nothing new is taken then.

    answering: how many answers are being written, for a request's tokens are all there before its client has them.
    """

    def num_open() -> int:
        return client.num_open + answering()

    if not await none_left(num_open, grace_s):
        reason = f"the server is shutting down and this request had not ended after {grace_s:g} s"
        client.drain()
        client.give_up(reason, "draining")
        await none_left(num_open, FLUSH_S)


class Drain:
    """One replica's part in stopping its application. All methods belong to the event loop.

    answering: as for `end_all`. on_state: hears the state's name when it changes.
    """

    def __init__(
        self, client: EngineClient, answering: Callable[[], int], app: str, on_state: Callable[[str], None]
    ) -> None:
        self._client = client
        self._answering = answering
        self._app = app
        self._on_state = on_state
        self._task: asyncio.Task[None] | None = None

    async def join(self) -> None:
        """For a replica that starts: take no request at all where the application is being stopped already."""
        if await asyncio.to_thread(word_stands, self._app):
            self.begin(0.0)

    def begin(self, grace_s: float) -> int:
        """Take nothing new until the word is gone; what is open after grace_s ends with an error. Idempotent: the first
        grace_s counts. Returns how many requests are open, those whose answers are still being written included."""
        if self._task is None:
            _log.info("draining grace_s=%g", grace_s)
            self._client.drain()
            self._on_state("draining")
            self._task = asyncio.create_task(self._run(grace_s))
        return self._client.num_open + self._answering()

    def close(self) -> None:
        """The replica ends."""
        if self._task is not None:
            self._task.cancel()

    async def _run(self, grace_s: float) -> None:
        ending = asyncio.create_task(end_all(self._client, self._answering, grace_s))
        try:
            while await asyncio.to_thread(word_stands, self._app) is not False:
                await asyncio.sleep(LOOK_S)
        finally:
            ending.cancel()
        _log.warning("nobody stops this application any more: requests are taken again")
        self._client.reopen()
        self._on_state(self._client.state.name)
        self._task = None
