"""How long one answer may take: until its first token, and until its end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from tpqwen.api.info import ApiSettings
from tpqwen.errors import EngineError


class Deadline:
    """Counts from `arrived`, monotonic. timeout_s: the request's own limit, which goes before the server's if shorter.

    Whatever passes first ends the block that `kept` opens, with EngineError 504 deadline_exceeded saying which.
    """

    def __init__(self, arrived: float, timeout_s: float | None, settings: ApiSettings) -> None:
        self._arrived = arrived
        self._first_s = settings.first_token_timeout_s
        self._whole_s, self._whole = settings.total_timeout_s, "the limit of {:g} s for one answer"
        if timeout_s is not None and (not self._whole_s or timeout_s < self._whole_s):
            self._whole_s, self._whole = timeout_s, "the request's timeout of {:g} s"
        self._scope = asyncio.timeout(None)

    @asynccontextmanager
    async def kept(self) -> AsyncGenerator[None]:
        """Until the block's end, or the deadline's."""
        try:
            async with asyncio.timeout(self._left(self._first())) as self._scope:
                yield
        except TimeoutError:
            text = self._whole.format(self._whole_s)
            if self._first_s and self._first_s == self._first():
                text = f"the limit of {self._first_s:g} s for a first token"
            raise EngineError(f"{text} passed", code="deadline_exceeded", status=504) from None

    def began(self) -> None:
        """The first token is there: from now on only the whole counts."""
        if self._first_s:
            self._first_s = 0.0
            left = self._left(self._whole_s)
            self._scope.reschedule(None if left is None else asyncio.get_running_loop().time() + left)

    def _first(self) -> float:
        """Seconds until the first thing that may pass; 0: nothing."""
        return min((s for s in (self._first_s, self._whole_s) if s), default=0.0)

    def _left(self, seconds: float) -> float | None:
        return max(self._arrived + seconds - time.monotonic(), 0.0) if seconds else None
