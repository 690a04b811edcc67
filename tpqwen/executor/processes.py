"""Processes of this node by their number: whether one is gone or stopped, and ending it.

Without /proc (not Linux) a process that is not gone counts as running.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

LOOK_S = 0.01
_CPU_CLOCK = 2  # of a process, as clock_getcpuclockid(3) makes clock ids on Linux


def state_of(pid: int) -> str:
    """The kernel's letter for it (R, S, D, T, Z, ...), empty when there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "" if Path("/proc").is_dir() or not _exists(pid) else "S"
    return text.rpartition(")")[2].split()[0]


def is_gone(pid: int) -> bool:
    """Whether it has ended. What it held is free by then, GPU memory included: the kernel closes files first."""
    return state_of(pid) in ("", "Z", "X")


def is_stopped(pid: int) -> bool:
    """Whether a signal has stopped it: it keeps its memory and its connections, and answers nobody."""
    return state_of(pid) == "T"


def cpu_s(pid: int) -> float | None:
    """Seconds of CPU that all its threads have used so far; None where that cannot be told (gone, or not Linux)."""
    try:
        return time.clock_gettime((~pid << 3) | _CPU_CLOCK)
    except OSError:
        return None


def wants_cpu(pid: int) -> bool:
    """Whether some thread of it runs, or would if it got a CPU or what it reads from a disk. False when it is gone."""
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):  # that thread has ended
                if Path(f"/proc/{pid}/task/{task}/stat").read_text().rpartition(")")[2].split()[0] in "RD":
                    return True
    return False


def kill(pid: int, timeout_s: float = 5.0) -> bool:
    """End it by SIGKILL, which a stopped process obeys too, and wait. False when it is still there after timeout_s."""
    deadline = time.monotonic() + timeout_s
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    while not is_gone(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(LOOK_S)
    return True


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
