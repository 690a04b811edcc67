"""The metrics of all replicas behind one /metrics: each leaves its text with a small Ray actor now and then.

Whoever is scraped puts the others' last texts, a few seconds old, beside its own. Without the actor it shows its own.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from ray.exceptions import RayError

from tpqwen.ledger import open_pages
from tpqwen.metrics import merge_texts

ROUND_S = 2.0
TIMEOUT_S = 2.0
NAME = "tpqwen-metrics"

_log = logging.getLogger(__name__)


class MetricsBoard:
    """One replica's view of the application's board. replica: its name among the others; text: its own metrics."""

    def __init__(self, replica: str, app: str, text: Callable[[], str]) -> None:
        self._replica = replica
        self._app = app
        self._text = text
        self._pages: Any = None  # held all the time: an actor that nobody of its maker's process holds is ended by Ray

    async def everyone(self) -> str:
        """The metrics of all replicas that left theirs lately, and this one's as they are now."""
        own = self._text()
        return merge_texts({**await self._exchange(own), self._replica: own})

    async def keep(self) -> None:
        """Runs until cancelled: leaves this replica's metrics for the others."""
        while True:
            await self._exchange(self._text())
            await asyncio.sleep(ROUND_S)

    async def _exchange(self, text: str) -> dict[str, str]:
        try:
            if self._pages is None:
                self._pages = await asyncio.to_thread(open_pages, NAME, self._app)
            others: dict[str, str] = await asyncio.wait_for(self._pages.exchange.remote(self._replica, text), TIMEOUT_S)
        except (RayError, ValueError, TimeoutError) as error:
            _log.warning("the other replicas' metrics are not to be had error=%s", error)
            self._pages = None
            return {}
        return others
