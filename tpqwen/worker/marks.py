"""When passes begin and end on the device: events that the host waits for, and the device's own time stamps."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray


class Marks:
    """`count` CUDA events in turn, so that a step makes none; a mark is over once `count` more were set. On a CPU no
    mark is an event."""

    def __init__(self, device: torch.device, count: int) -> None:
        self._events: list[torch.cuda.Event] = []
        self._turn = 0
        if device.type == "cuda":
            self._stream = torch.cuda.current_stream(device)
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(count)]  # type: ignore[no-untyped-call]

    def set(self) -> torch.cuda.Event | None:
        """An event that passes when everything launched so far is done."""
        if not self._events:
            return None
        self._turn = (self._turn + 1) % len(self._events)
        event = self._events[self._turn]
        event.record(self._stream)
        return event


class Idle:
    """Reads how long the device did nothing between two decode passes from the stamps that passes leave.

    stamps int64 [passes, 2], ns of the device's clock at a pass's begin and end: SlotTensors.stamps. A pass without
    stamps (on a CPU, or one that samples outside of it) leaves zeros.
    """

    def __init__(self, stamps: NDArray[np.int64]) -> None:
        self._stamps = stamps
        self._last_end = 0  # of the pass before, if that was a decode pass

    def after(self, turn: int, *, decodes: bool) -> float | None:
        """Take in the pass that was the turn-th to begin, when it has ended; passes are told in order.

        decodes: it ran decode rows and nothing else. Returns the seconds between the end of the pass before and its
        begin where both do, else None: before other passes the device may have had nothing to do.
        """
        stamps = self._stamps[turn % len(self._stamps)]
        begin, end = stamps.tolist()
        stamps[:] = 0  # the place is used again by a later pass, which may leave no end
        before, self._last_end = self._last_end, end if decodes else 0
        return max(0, begin - before) / 1e9 if decodes and before and begin else None
