"""The metrics of all replicas behind one /metrics: each leaves its text with a small Ray actor now and then.

Whoever is scraped puts the others' last texts, a few seconds old, beside its own. Without the actor it shows its own.
A replica that sees no other leaves an empty page: writing the text takes the event loop milliseconds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from tpqwen.ledger import SharedPages
from tpqwen.metrics import merge_texts

ROUND_S = 2.0
NAME = "tpqwen-metrics"


class MetricsBoard:
    """One replica's view of the application's board. replica: its name among the others; text: its own metrics."""

    def __init__(self, replica: str, app: str, text: Callable[[], str]) -> None:
        self._replica = replica
        self._text = text
        self._pages = SharedPages(NAME, replica, app)

    async def everyone(self) -> str:
        """The metrics of all replicas that left theirs lately, and this one's as they are now."""
        own = self._text()
        others: dict[str, str] = await self._pages.exchange(own) or {}
        return merge_texts({**others, self._replica: own})

    async def keep(self) -> None:
        """Runs until cancelled: leaves this replica's metrics for the others, if there are any."""
        others: dict[str, str] | None = None
        while True:
            others = await self._pages.exchange(self._text() if others else "")
            await asyncio.sleep(ROUND_S)
