"""Sends one answer: as server-sent events with comments in silence, or whole."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import aclosing, suppress

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

    So whatever goes wrong before is an ordinary JSON error. Within `async with stream` a comment is written after each
    comment_every_s of silence, and give_up is called when one write has hung for drop_client_after_s.
    """

    def __init__(
        self, send: Send, settings: ApiSettings, timing: Callable[[], str], give_up: Callable[[], None]
    ) -> None:
        self.begun = False
        self._send = send
        self._settings = settings
        self._timing = timing
        self._give_up = give_up
        self._timer: asyncio.TimerHandle | None = None
        self._comment: asyncio.Task[None] | None = None
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

    async def __aenter__(self) -> None:
        self._look_later()

    async def __aexit__(self, *_error: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._comment is not None:
            self._comment.cancel()
            await asyncio.gather(self._comment, return_exceptions=True)

    def _look_later(self) -> None:
        every = self._settings.comment_every_s
        silent = time.monotonic() - self._last_write
        self._timer = asyncio.get_running_loop().call_later(max(every - silent, every / 10), self._look)

    def _look(self) -> None:
        now = time.monotonic()
        if self._writing_since is not None:
            if now - self._writing_since > self._settings.drop_client_after_s:
                self._give_up()
                return
        elif now - self._last_write >= self._settings.comment_every_s:
            self._comment = asyncio.create_task(self._write_comment())
        self._look_later()

    async def _write_comment(self) -> None:
        with suppress(Exception):  # whoever writes the answer meets it too
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
    async with stream:
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
    async with deadline, aclosing(running.outputs()) as outputs:
        async for index, delta in outputs:
            deadline.began()
            parts[index].append(delta)
    return [joined(p) for p in parts]


async def _write_events(running: Running, answer: Answer, call: Call, stream: EventStream, deadline: Deadline) -> None:
    opened: set[int] = set()
    left = len(running.sequences)
    data = b""
    async with deadline, aclosing(running.outputs()) as outputs:
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
