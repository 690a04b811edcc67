"""Logging set-up: one line per event on stderr, key=value, the same in every process.

`2026-11-24T10:15:02.123 level=info process="rank 0/2" logger=tpqwen.worker.load loaded stage=weights seconds=1.2`
A message is a few words and then its own key=value fields.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from contextlib import nullcontext, suppress
from datetime import datetime
from typing import TextIO

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def configure(
    level: str, process: str, stream: TextIO | None = None, loop: asyncio.AbstractEventLoop | None = None
) -> None:
    """Send the `tpqwen` loggers of this process to stderr at `level` (debug, info, warning, error). Repeatable.

    process names who speaks: replica, engine, rank 0/2, cli. Other libraries' loggers are left as they are.
    loop: the running event loop, for TurnHandler.
    """
    stream = sys.stderr if stream is None else stream
    handler = logging.StreamHandler(stream) if loop is None else TurnHandler(stream, loop)
    handler.setFormatter(KeyValueFormatter(process))
    root = logging.getLogger("tpqwen")
    root.handlers[:] = [handler]
    root.setLevel(LEVELS[level])
    root.propagate = False


class TurnHandler(logging.StreamHandler[TextIO]):
    """Writes what this thread's event loop has to say in one of its turns at once: requests end in crowds.

    Warnings, errors and what other threads say is written as it comes, after what waits.
    """

    def __init__(self, stream: TextIO, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(stream)
        self._loop = loop
        self._thread = threading.get_ident()
        self._lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno > logging.INFO or threading.get_ident() != self._thread or self._loop.is_closed():
            self._write_waiting()
            super().emit(record)
            return
        try:
            self._lines.append(self.format(record) + self.terminator)
        except Exception:
            self.handleError(record)
        if len(self._lines) == 1:
            self._loop.call_soon(self.flush)

    def flush(self) -> None:
        """Write what waits."""
        with self.lock or nullcontext():
            self._write_waiting()
            with suppress(OSError, ValueError):
                super().flush()

    def _write_waiting(self) -> None:
        """A stream that takes nothing, closed or on a full disk, must not fail whoever has something to say."""
        lines, self._lines = self._lines, []
        with suppress(OSError, ValueError):
            self.stream.write("".join(lines))


class KeyValueFormatter(logging.Formatter):
    """Local time with milliseconds, level, process, logger, then the message on the same line whatever it holds."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = f'"{process}"' if " " in process else process

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created).isoformat(timespec="milliseconds")
        message = record.getMessage()
        if not message.isprintable():
            message = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
        line = f"{when} level={record.levelname.lower()} process={self._process} logger={record.name} {message}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line
