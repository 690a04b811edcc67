"""What a Ray worker calls itself in `ps`. Ray renames its workers at every call: the title is put back now and then."""

from __future__ import annotations

import threading
import time

# Ray holds the process's argv; a second library could not write to it.
from ray._raylet import setproctitle  # type: ignore[attr-defined]

KEEP_S = 0.5


def keep_title(title: str) -> None:
    """Show this title from now on, until the process ends."""

    def keep() -> None:
        while True:
            setproctitle(title)
            time.sleep(KEEP_S)

    threading.Thread(target=keep, name="title", daemon=True).start()
