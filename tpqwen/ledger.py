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


async def share_limits(limiter: Limiter, replica: str, app: str) -> None:
    """Runs until cancelled: one round of the ledger of this application every ROUND_S."""
    reader = Reader()
    working = True
    ledger: Any = None  # held all the time: an actor that nobody of its maker's process holds is ended by Ray
    while True:
        await asyncio.sleep(ROUND_S)
        totals = {key: (u.requests, u.tokens, u.running) for key, u in limiter.usage().items()}
        try:
            if ledger is None:
                ledger = await asyncio.to_thread(open_pages, NAME, app)
            pages = await asyncio.wait_for(ledger.exchange.remote(replica, totals), TIMEOUT_S)
        except (RayError, ValueError, TimeoutError) as error:
            if working:
                _log.warning("limits count on this replica alone until the ledger answers again error=%s", error)
            working, ledger = False, None
            limiter.others_took({})
            continue
        working = True
        limiter.others_took(reader.grown(pages))


def open_pages(name: str, app: str) -> Any:
    """The application's pages of that name: found, or made by whoever comes first. They end with the replica that made
    them."""
    options = {"name": f"{name}-{app}", "namespace": NAME, "get_if_exists": True, "num_cpus": 0, "max_restarts": 0}
    return ray.remote(Pages).options(**options).remote()
