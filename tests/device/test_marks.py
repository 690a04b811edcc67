"""The device's idle time between decode passes, from the stamps that passes leave in a ring."""

from __future__ import annotations

import numpy as np
import torch

from tpqwen.worker.marks import Idle, Marks


def test_idle_time_is_what_lies_between_two_decode_passes() -> None:
    stamps = np.zeros((4, 2), np.int64)
    idle = Idle(stamps)
    seen = []
    now = 10**18
    for turn in range(10):
        begin = now + 1000 * turn
        stamps[turn % 4] = begin, begin + 500_000
        now = begin + 500_000
        seen.append(idle.after(turn, decodes=True))
    assert seen == [None, *(turn * 1000 / 1e9 for turn in range(1, 10))]
    assert not stamps.any(), "a place is cleared for the pass that uses it next"


def test_passes_with_prompts_and_without_stamps_interrupt_the_measurement() -> None:
    stamps = np.zeros((4, 2), np.int64)
    idle = Idle(stamps)

    def after(turn: int, begin: int, end: int, *, decodes: bool = True) -> float | None:
        stamps[turn % 4] = begin, end
        return idle.after(turn, decodes=decodes)

    assert after(0, 100, 200, decodes=False) is None
    assert after(1, 5000, 6000) is None, "the pass before had prompts: the device may have waited for a request"
    assert after(2, 6300, 7000) == 300e-9
    assert after(3, 7100, 8000, decodes=False) is None
    assert after(4, 8100, 9000) is None
    assert after(5, 9100, 0) == 100e-9, "it begins, and ends without sampling"
    assert after(6, 9900, 9950) is None
    assert after(7, 9949, 9990) == 0.0, "the last program of a pass is not always the last to end"


def test_a_cpu_has_no_events() -> None:
    marks = Marks(torch.device("cpu"), 4)
    assert [marks.set() for _ in range(9)] == [None] * 9
