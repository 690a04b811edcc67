"""The event loop's end of one engine's channels: commands go out without waiting, a thread reads the reports."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable

from tpqwen.engine.messages import Command, Dead, Report, decode_report, encode
from tpqwen.transport.channel import Receiver, Sender

POLL_S = 0.5
RETRY_S = 0.005  # while the engine is too busy to read its commands
JOIN_S = 5.0


class Line:
    """Belongs to one engine process and ends with it. take is called on the event loop, never after `close`."""

    def __init__(
        self,
        commands: Sender,
        reports: Receiver,
        loop: asyncio.AbstractEventLoop,
        take: Callable[[Report], None],
    ) -> None:
        self._commands = commands
        self._reports = reports
        self._loop = loop
        self._take = take
        self._unsent: deque[bytes] = deque()
        self._closed = False
        self._thread = threading.Thread(target=self._read, name="engine-reports", daemon=True)
        self._thread.start()

    def send(self, command: Command) -> None:
        """Now, or as soon as the engine has room, in order. Raises ConnectionError."""
        self._unsent.append(encode(command))
        if len(self._unsent) == 1:
            self._flush()

    def drop_unsent(self) -> None:
        """Forget what the engine had no room for."""
        self._unsent.clear()

    def close(self) -> None:
        """Neither send nor listen any more. Idempotent."""
        self._closed = True
        self._unsent.clear()
        self._commands.close()
        self._reports.close()

    def join(self) -> None:
        """Wait for the reading thread, after `close`."""
        self._thread.join(JOIN_S)

    def _flush(self) -> None:
        try:
            while self._unsent:
                self._commands.send(self._unsent[0], 0.0)
                self._unsent.popleft()
        except TimeoutError:
            self._loop.call_later(RETRY_S, self._retry)

    def _retry(self) -> None:
        try:
            self._flush()
        except ConnectionError as error:
            self._deliver(Dead(f"the engine cannot be reached: {error}", "engine_dead"))

    def _read(self) -> None:
        """The reader thread: one hand-over to the event loop per message."""
        while not self._closed:
            try:
                data = self._reports.recv(POLL_S)
            except ConnectionError:
                self._hand_over(Dead("the engine process has ended", "engine_dead"))
                return
            if data is not None:
                self._hand_over(decode_report(data))

    def _hand_over(self, report: Report) -> None:
        try:
            self._loop.call_soon_threadsafe(self._deliver, report)
        except RuntimeError:  # the event loop is closed: nobody is left to tell
            self._closed = True

    def _deliver(self, report: Report) -> None:
        if not self._closed:
            self._take(report)
