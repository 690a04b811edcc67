"""Looking at processes from outside, and waiting for conditions."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path


def until(condition: Callable[[], object], what: str, timeout_s: float = 60.0) -> None:
    """Wait until the condition holds; fail with `what` if it does not."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.02)


def title(pid: int) -> str:
    """What `ps` shows for the process; empty when there is none (a zombie counts as none)."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except OSError:
        return ""


def children_of(ancestors: set[int]) -> set[int]:
    """All living descendants of the given processes."""
    found: set[int] = set()
    parents = {pid: parent for pid in pids() if (parent := parent_of(pid)) is not None}
    while new := {pid for pid, parent in parents.items() if parent in ancestors | found} - found:
        found |= new
    return found


def pids() -> list[int]:
    return [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit()]


def parent_of(pid: int) -> int | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, parent = text.rpartition(")")[2].split()[:2]
    return None if state == "Z" else int(parent)
