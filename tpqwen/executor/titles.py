"""What a Ray worker calls itself in `ps`. Ray renames its workers at every call; ours keep one name."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ray._private import worker as ray_worker

# Ray holds the process's argv; a second library could not write to it.
from ray._raylet import setproctitle  # type: ignore[attr-defined]

KEEP_S = 0.5

_kept = ""


def keep_title(title: str) -> None:
    """Show this title from now on, until the process ends or another one is kept.

    Calls that begin later no longer rename the process; the one that is running (the constructor) still does at its
    end, and Ray may change how it renames, so the title is also put back now and then.
    """

    global _kept
    first, _kept = not _kept, title
    if not first:
        return

    @contextmanager
    def keep_name(_title: str, _next_title: str) -> Iterator[None]:
        yield

    def keep() -> None:
        while True:
            setproctitle(_kept)
            time.sleep(KEEP_S)

    ray_worker._changeproctitle = keep_name
    threading.Thread(target=keep, name="title", daemon=True).start()
