"""Who gets the signals that end `tpqwen serve`: this process, once, and none of Ray's."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

from ray._private import services
from ray._private.utils import detect_fate_sharing_support

ECHO_S = 1.0
ENDING = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """SIGINT and SIGTERM raise KeyboardInterrupt, within `with Interrupts() as interrupts:`.

    What comes within ECHO_S after one is its echo and does nothing: `timeout` signals its child and then the child's
    group, and a wrapper that forwards Ctrl-C does so beside the terminal.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._deaf_until = float("-inf")
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        self._before = {number: signal.getsignal(number) for number in ENDING}
        self.take()
        return self

    def __exit__(self, *_error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def take(self) -> None:
        """Put these handlers in place, again where others (Ray) have put theirs."""
        for number in ENDING:
            signal.signal(number, self._interrupt)

    def ignore(self) -> None:
        """From now on signals do nothing: what is left to do takes seconds, and half of it would leave processes."""
        self._deaf_until = float("inf")

    def _interrupt(self, _number: int, _frame: FrameType | None) -> None:
        now = self._clock()
        if now >= self._deaf_until:
            self._deaf_until = now + ECHO_S
            raise KeyboardInterrupt


@contextmanager
def sessions_of_their_own() -> Iterator[None]:
    """Processes that Ray starts in here each get a session, so that a signal to this process's group spares them.

    Ray blocks SIGINT in them, but SIGTERM would end the raylet, and with it the replica, before anything has drained.
    They end with this process in any case, since the kernel sees to it (PR_SET_PDEATHSIG). Where it does not, as on
    macOS, a signal to the group is what ends them, and nothing is changed. Ray has no option for this.
    """
    if not detect_fate_sharing_support():
        yield
        return
    popen = services.ConsolePopen
    services.ConsolePopen = partial(popen, start_new_session=True)
    try:
        yield
    finally:
        services.ConsolePopen = popen
