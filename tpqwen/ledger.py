"""What each replica served of each key, for all to see: one small Ray actor, asked now and then, never by a request.

A replica writes its own totals and reads the others'; what they grew by is charged to its own buckets (api/limits.py).
The actor keeps nothing that matters: if it dies, the next round makes a new one, and until then every replica counts
for itself.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

import ray
from ray.exceptions import RayError

from tpqwen.api.limits import Limiter, Usage

ROUND_S = 0.5
TIMEOUT_S = 5.0
SILENT_S = 5.0  # a replica that has not written for so long runs nothing any more
NAME = "tpqwen-ledger"

Totals = dict[str, tuple[int, int, int]]  # key id -> requests, tokens, running

_log = logging.getLogger(__name__)


class Pages:
    """What every replica wrote lately: its totals here, its metrics in board.py."""

    def __init__(self) -> None:
        self._pages: dict[str, tuple[float, Any]] = {}

    def exchange(self, replica: str, page: Any) -> dict[str, Any]:
        """Write this replica's page; returns those of all others."""
        now = time.monotonic()
        self._pages[replica] = (now, page)
        self._pages = {name: page for name, page in self._pages.items() if now - page[0] < SILENT_S}
        return {name: page for name, (_, page) in self._pages.items() if name != replica}


class Reader:
    """Turns the others' totals into what they served since the last round. A total that fell started anew."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str], tuple[int, int]] = {}

    def grown(self, pages: dict[str, Totals]) -> dict[str, Usage]:
        """Sums over all replicas, by key."""
        sums: dict[str, Usage] = {}
        seen: dict[tuple[str, str], tuple[int, int]] = {}
        for replica, totals in pages.items():
            for key, (requests, tokens, running) in totals.items():
                before = self._seen.get((replica, key), (0, 0))
                if requests < before[0] or tokens < before[1]:
                    before = (0, 0)
                seen[replica, key] = (requests, tokens)
                old = sums.get(key, Usage())
                sums[key] = Usage(
                    old.requests + requests - before[0], old.tokens + tokens - before[1], old.running + running
                )
        self._seen = seen
        return sums


class SharedPages:
    """One replica's way to the application's pages of one name. It says once when they are not to be had."""

    def __init__(self, name: str, replica: str, app: str) -> None:
        self._name = name
        self._replica = replica
        self._app = app
        self._actor: Any = None  # held all the time: an actor that nobody of its maker's process holds is ended by Ray
        self._working = True

    async def exchange(self, page: Any) -> dict[str, Any] | None:
        """Leave this replica's page; the others' by replica, or None when the pages are not to be had."""
        try:
            if self._actor is None:
                self._actor = await asyncio.to_thread(self._open)
            others: dict[str, Any] = await asyncio.wait_for(self._actor.exchange.remote(self._replica, page), TIMEOUT_S)
        except (RayError, ValueError, TimeoutError) as error:
            if self._working:
                _log.warning("this replica stands alone until %s answers again error=%s", self._name, error)
            self._working, self._actor = False, None
            return None
        self._working = True
        return others

    def _open(self) -> Any:
        """Found, or made by whoever comes first. They end with the replica that made them."""
        name = f"{self._name}-{self._app}"
        options = {"name": name, "namespace": NAME, "get_if_exists": True, "num_cpus": 0, "max_restarts": 0}
        return ray.remote(Pages).options(**options).remote()


async def share_limits(limiter: Limiter, replica: str, app: str) -> None:
    """Runs until cancelled: one round of the ledger of this application every ROUND_S. Without the ledger the limits
    count on this replica alone."""
    reader, ledger = Reader(), SharedPages(NAME, replica, app)
    while True:
        await asyncio.sleep(ROUND_S)
        pages = await ledger.exchange({key: (u.requests, u.tokens, u.running) for key, u in limiter.usage().items()})
        limiter.others_took({} if pages is None else reader.grown(pages))
