"""How long one answer may take: until its first token, and until its end."""

from __future__ import annotations

import asyncio
import time
from types import TracebackType

from tpqwen.api.info import ApiSettings
from tpqwen.errors import EngineError


class Deadline:
    """Counts from `arrived`, monotonic. timeout_s: the request's own limit, which goes before the server's if shorter.

    Whatever passes first ends the block `async with deadline` with EngineError 504 deadline_exceeded saying which. As
    asyncio.timeout, with one timer for both limits, which is looked at again when it fires and not when the first token
    comes: that is half the cost, and every request pays it.
    """

    def __init__(self, arrived: float, timeout_s: float | None, settings: ApiSettings) -> None:
        self._arrived = arrived
        self._first_s = settings.first_token_timeout_s
        self._whole_s, self._whole = settings.total_timeout_s, "the limit of {:g} s for one answer"
        if timeout_s is not None and (not self._whole_s or timeout_s < self._whole_s):
            self._whole_s, self._whole = timeout_s, "the request's timeout of {:g} s"
        self._task: asyncio.Task[object] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._passed = ""
        self._cancelled_before = 0

    async def __aenter__(self) -> None:
        task = self._task = asyncio.current_task()
        assert task is not None
        self._cancelled_before = task.cancelling()
        self._set_timer()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._passed:
            assert self._task is not None
            if self._task.uncancel() <= self._cancelled_before and kind is asyncio.CancelledError:
                raise EngineError(f"{self._passed} passed", code="deadline_exceeded", status=504) from None

    def began(self) -> None:
        """The first token is there: from now on only the whole counts."""
        self._first_s = 0.0

    @property
    def _soonest_s(self) -> float:
        """Seconds from the arrival to the first limit that may pass; 0: none."""
        return min((s for s in (self._first_s, self._whole_s) if s), default=0.0)

    def _set_timer(self) -> None:
        if soonest_s := self._soonest_s:
            left = self._arrived + soonest_s - time.monotonic()
            self._timer = asyncio.get_running_loop().call_later(max(left, 0.0), self._look)

    def _look(self) -> None:
        """A limit may have passed: then end the block; the first token's may have become void since."""
        soonest_s = self._soonest_s
        if not soonest_s or self._arrived + soonest_s > time.monotonic():
            self._set_timer()
            return
        is_first = soonest_s == self._first_s
        self._passed = f"the limit of {soonest_s:g} s for a first token" if is_first else self._whole.format(soonest_s)
        assert self._task is not None
        self._task.cancel()
