"""Sends one answer: as server-sent events with comments in silence, or whole."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager

from starlette.types import Send

from tpqwen.api.answers import COMMENT, Answer, joined
from tpqwen.api.calls import Call
from tpqwen.api.deadline import Deadline
from tpqwen.api.failures import failure
from tpqwen.api.info import ApiSettings
from tpqwen.api.running import Running
from tpqwen.text.pipeline import TextDelta

_EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class EventStream:
    """A response of events that is begun late: nothing is sent until the first event or the first long silence.

    So whatever goes wrong before is an ordinary JSON error. `watch` runs beside the writer; it writes a comment after
    each comment_every_s of silence, and calls give_up when one write has hung for drop_client_after_s.
    """

    def __init__(self, send: Send, settings: ApiSettings, timing: Callable[[], str]) -> None:
        self.begun = False
        self._send = send
        self._settings = settings
        self._timing = timing
        self._lock = asyncio.Lock()
        self._writing_since: float | None = None
        self._last_write = time.monotonic()

    async def write(self, data: bytes, last: bool = False) -> None:
        """Send data now. `last` ends the response."""
        async with self._lock:
            self._writing_since = time.monotonic()
            if not self.begun:
                self.begun = True
                timing = self._timing()
                headers = [*_EVENT_STREAM, *([(b"server-timing", timing.encode())] if timing else [])]
                await self._send({"type": "http.response.start", "status": 200, "headers": headers})
            await self._send({"type": "http.response.body", "body": data, "more_body": not last})
            self._last_write = time.monotonic()
            self._writing_since = None

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """`watch` runs beside the block; whoever does not read ends the task as if they had left."""
        task = asyncio.current_task()
        assert task is not None
        watcher = asyncio.create_task(self.watch(task.cancel))
        try:
            yield
        finally:
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)

    async def watch(self, give_up: Callable[[], object]) -> None:
        """Runs until cancelled, or until give_up was called."""
        every = self._settings.comment_every_s
        while True:
            silent = time.monotonic() - self._last_write
            await asyncio.sleep(max(every - silent, every / 10))
            since = self._writing_since
            if since is not None:
                if time.monotonic() - since > self._settings.drop_client_after_s:
                    give_up()
                    return
            elif time.monotonic() - self._last_write >= every:
                await self.write(COMMENT)


async def send_events(
    running: Running,
    answer: Answer,
    call: Call,
    stream: EventStream,
    deadline: Deadline,
    request_id: str,
) -> int:
    """Stream the answer; returns the status that counts in metrics.

    An error before the first byte is raised; after it, it is one event and the stream ends without [DONE].
    """
    async with stream.watched():
        try:
            await _write_events(running, answer, call, stream, deadline)
        except Exception as error:
            if not stream.begun:
                raise
            failed = failure(error, request_id)
            await stream.write(answer.failed(failed), last=True)
            return failed.status
    return 200


async def collect(running: Running, deadline: Deadline) -> list[TextDelta]:
    """One complete delta for each choice. Raises EngineError, RequestError."""
    parts: list[list[TextDelta]] = [[] for _ in running.sequences]
    async with deadline.kept(), aclosing(running.outputs()) as outputs:
        async for index, delta in outputs:
            deadline.began()
            parts[index].append(delta)
    return [joined(p) for p in parts]


async def _write_events(running: Running, answer: Answer, call: Call, stream: EventStream, deadline: Deadline) -> None:
    opened: set[int] = set()
    left = len(running.sequences)
    data = b""
    async with deadline.kept(), aclosing(running.outputs()) as outputs:
        async for index, delta in outputs:
            deadline.began()
            if index not in opened:
                opened.add(index)
                data = answer.opening(index, delta, running.usage)
            data += answer.events(index, delta, running.usage if call.continuous_usage else None)
            left -= delta.finish_reason is not None
            if data and left:  # the last one goes out with what ends the stream
                await stream.write(data)
                data = b""
    await stream.write(data + answer.ending(running.usage), last=True)
