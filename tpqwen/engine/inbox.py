"""What came for one request and was not read yet: one delta that grows, so that a late reader gets all at once."""

from __future__ import annotations

import asyncio

from tpqwen.request import Delta, TokenLogprob


class Inbox:
    """One writer, one reader, one event loop. Takes deltas in order, or the exception that refused the request.

    What is put to be held waits for `release`, or for something that is not held: the end of a request never is.
    """

    def __init__(self) -> None:
        self._delta: Delta | None = None
        self._failure: Delta | Exception | None = None  # comes after _delta: tokens go out before what ended them
        self._reader: asyncio.Future[None] | None = None
        self._is_free = False  # what is here may be read

    @property
    def unread(self) -> int:
        """Tokens that nobody has read."""
        return len(self._delta.token_ids) if self._delta is not None else 0

    def put_nowait(self, item: Delta | Exception, *, hold: bool = False) -> int:
        """Add to what is there. The delta is ours from now on. Returns how many tokens nobody has read."""
        if isinstance(item, Exception) or item.error is not None:
            self._failure = item
        elif self._delta is None:
            self._delta = item
        else:
            _append(self._delta, item)
        if not hold or self._is_over:
            self.release()
        return self.unread

    def release(self) -> None:
        """What has come may be read."""
        if self._delta is not None or self._failure is not None:
            self._is_free = True
            if self._reader is not None and not self._reader.done():
                self._reader.set_result(None)

    async def get(self) -> Delta:
        """All that has come, when there is something that may be read. Raises the exception that was put."""
        while not self._is_free:
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        delta, self._delta = self._delta, None
        self._is_free = self._failure is not None
        if delta is not None:
            return delta
        if isinstance(self._failure, Exception):
            raise self._failure
        assert self._failure is not None
        return self._failure

    @property
    def _is_over(self) -> bool:
        return self._failure is not None or (self._delta is not None and self._delta.finish_reason is not None)


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
