"""CPU time of processes on this machine, found by a word of what they call themselves."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class CpuTimes:
    """Remembers now; says later how much was used since, by word. Processes that end meanwhile are not counted."""

    def __init__(self, words: Sequence[str]) -> None:
        self._before = {word: _seconds_of(word) for word in words}

    def per_token_us(self, tokens: int) -> dict[str, float]:
        """Microseconds of all processes of a word since the start, per token."""
        used = {}
        for word, before in self._before.items():
            seconds = sum(s - before[pid] for pid, s in _seconds_of(word).items() if pid in before)
            used[word] = round(seconds * 1e6 / max(tokens, 1), 2)
        return used


def shown_name(pid: int) -> str:
    """What the process calls itself: its title, or its program without the folder; not its arguments, in which any
    word may be. Empty for a zombie. Raises OSError when there is no such process."""
    argv0 = Path(f"/proc/{pid}/cmdline").read_bytes().partition(b"\0")[0].decode(errors="replace")
    return argv0.rpartition("/")[2] if argv0.startswith(("/", ".")) else argv0  # a title may have a slash too


def _seconds_of(word: str) -> dict[int, float]:
    """User and system time by process id, from proc(5); empty where there is no /proc."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if word in shown_name(int(folder.name)) and int(folder.name) != os.getpid():
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                found[int(folder.name)] = (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
        except OSError:
            continue
    return found
