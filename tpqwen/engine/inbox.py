"""What came for one request and was not read yet: one delta that grows, so that a late reader gets all at once."""

from __future__ import annotations

import asyncio

from tpqwen.request import Delta, TokenLogprob


class Inbox:
    """One writer, one reader, one event loop. Takes deltas in order, or the exception that refused the request."""

    def __init__(self) -> None:
        self._delta: Delta | None = None
        self._failure: Delta | Exception | None = None  # comes after _delta: tokens go out before what ended them
        self._reader: asyncio.Future[None] | None = None
        self._pausing = False

    @property
    def unread(self) -> int:
        """Tokens that nobody has read."""
        return len(self._delta.token_ids) if self._delta is not None else 0

    def put_nowait(self, item: Delta | Exception) -> int:
        """Add to what is there. The delta is ours from now on. Returns how many tokens nobody has read."""
        if isinstance(item, Exception) or item.error is not None:
            self._failure = item
        elif self._delta is None:
            self._delta = item
        else:
            _append(self._delta, item)
        if not self._pausing or self._is_over:
            self._wake()
        return self.unread

    async def get(self, pause_s: float = 0.0) -> Delta:
        """All that has come: when there is something and pause_s are over, but the end of a request at once.

        Raises the exception that was put.
        """
        if pause_s > 0 and not self._is_over:
            await self._pause(pause_s)
        while self._delta is None and self._failure is None:
            await self._wait()
        if self._delta is not None:
            delta, self._delta = self._delta, None
            return delta
        if isinstance(self._failure, Exception):
            raise self._failure
        assert self._failure is not None
        return self._failure

    @property
    def _is_over(self) -> bool:
        return self._failure is not None or (self._delta is not None and self._delta.finish_reason is not None)

    async def _pause(self, seconds: float) -> None:
        timer = asyncio.get_running_loop().call_later(seconds, self._wake)
        self._pausing = True
        try:
            await self._wait()
        finally:
            self._pausing = False
            timer.cancel()

    async def _wait(self) -> None:
        self._reader = asyncio.get_running_loop().create_future()
        try:
            await self._reader
        finally:
            self._reader = None

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


def _append(delta: Delta, later: Delta) -> None:
    """What only the first delta of a request carries stays; how it ends comes from the later one."""
    if delta.logprobs is not None or later.logprobs is not None:
        delta.logprobs = [*_scores(delta), *_scores(later)]
    delta.token_ids += later.token_ids
    if later.finish_reason is not None:
        delta.finish_reason, delta.stop_id = later.finish_reason, later.stop_id
    if later.resumed > delta.resumed:
        delta.resumed = later.resumed


def _scores(delta: Delta) -> list[TokenLogprob | None]:
    """One for each token."""
    return [None] * len(delta.token_ids) if delta.logprobs is None else delta.logprobs
