"""Work that goes on beside a test."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Self


class Background:
    """A thread for each piece of work, within the block; the work ends itself when it is `over`."""

    def __init__(self, *work: Callable[[], None]) -> None:
        self.over = threading.Event()
        self._threads = [threading.Thread(target=each) for each in work]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.over.set()
        for thread in self._threads:
            thread.join()
