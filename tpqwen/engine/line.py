"""The event loop's end of one engine's channels: commands go out without waiting, a thread reads the reports."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from tpqwen.engine.messages import Command, Dead, Report, decode_report, encode, together
from tpqwen.transport.channel import Receiver, Sender

POLL_S = 0.5
RETRY_S = 0.005  # while the engine is too busy to read its commands
JOIN_S = 5.0
TOGETHER = 8  # commands in one message at most: prompts for one pass, while the next ones are read
TOGETHER_BYTES = 512 * 1024  # the same, if it is not one command alone: a ring holds several such messages


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
        self._unsent: list[bytes] = []
        self._flushing: asyncio.Handle | None = None  # what will send them
        self._is_broken = False
        self._closed = False
        self._thread = threading.Thread(target=self._read, name="engine-reports", daemon=True)
        self._thread.start()

    def send(self, command: Command) -> None:
        """When this turn of the event loop ends, or enough have come, or the engine has room for it; in order.

        Nothing any more once the engine could not be reached, which is reported once, as Dead.
        """
        if self._is_broken:
            return
        self._unsent.append(encode(command))
        if self._flushing is None:
            self._flushing = self._loop.call_soon(self.flush)
        elif len(self._unsent) == TOGETHER:
            self.flush()

    def flush(self) -> None:
        """Send now what is waiting, several in one message: they come in crowds, and each message wakes the engine."""
        if self._flushing is not None:
            self._flushing.cancel()
            self._flushing = None
        try:
            while self._unsent:
                count = self._num_together()
                self._commands.send(together(self._unsent[:count]), 0.0)
                del self._unsent[:count]
        except TimeoutError:
            self._flushing = self._loop.call_later(RETRY_S, self.flush)
        except ConnectionError as error:
            self._is_broken = True
            self._unsent.clear()
            self._deliver(Dead(f"the engine cannot be reached: {error}", "engine_dead"))

    def drop_unsent(self) -> None:
        """Forget what has not been sent yet."""
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

    def _num_together(self) -> int:
        """How many of the waiting commands go into the next message."""
        size = 0
        for count, data in enumerate(self._unsent[:TOGETHER]):
            size += len(data)
            if size > TOGETHER_BYTES:
                return max(count, 1)
        return min(len(self._unsent), TOGETHER)

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
