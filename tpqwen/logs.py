"""Logging set-up: one line per event on stderr, key=value, the same in every process.

`2026-11-24T10:15:02.123 level=info process="rank 0/2" logger=tpqwen.worker.load loaded stage=weights seconds=1.2`
A message is a few words and then its own key=value fields.
"""

from __future__ import annotations

import logging
import sys
from datetime import datetime
from typing import TextIO

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def configure(level: str, process: str, stream: TextIO | None = None) -> None:
    """Send the `tpqwen` loggers of this process to stderr at `level` (debug, info, warning, error). Repeatable.

    process names who speaks: replica, engine, rank 0/2, cli. Other libraries' loggers are left as they are.
    """
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(KeyValueFormatter(process))
    root = logging.getLogger("tpqwen")
    root.handlers[:] = [handler]
    root.setLevel(LEVELS[level])
    root.propagate = False


class KeyValueFormatter(logging.Formatter):
    """Local time with milliseconds, level, process, logger, then the message on the same line whatever it holds."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = f'"{process}"' if " " in process else process

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created).isoformat(timespec="milliseconds")
        message = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in record.getMessage())
        line = f"{when} level={record.levelname.lower()} process={self._process} logger={record.name} {message}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line
