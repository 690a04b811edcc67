"""What processes here may use of this machine: its memory and processors, or less by a limit of their control groups.

cgroups(7) and the kernel's admin-guide/cgroup-v2.rst have the files' format.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

CGROUPS, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def host_memory() -> int:
    """Bytes of memory."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in _limits("memory", "memory.max", "memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # "max" is none
            limits.append(int(path.read_text()))
    return min(limits)


def num_cpus() -> int:
    """Processors: those that this process may run on, or as many as its share of their time is worth, rounded up."""
    limits = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1]
    for path in _limits("cpu", "cpu.max", "cpu.cfs_quota_us"):
        with suppress(OSError, ValueError):
            period = path.with_name("cpu.cfs_period_us")
            texts = path.read_text().split() if path.name == "cpu.max" else [path.read_text(), period.read_text()]
            quota_us, period_us = map(int, texts)
            if quota_us > 0:  # -1 is none
                limits.append(-(-quota_us // period_us))
    return min(limits)


def _limits(controller: str, name: str, name_of_version_1: str) -> Iterator[Path]:
    """Where the limits of this process's control group and of those above it are, if they are there.

    In a container the path may be the host's, and only the root is there.
    """
    with suppress(OSError):
        for line in OWN_CGROUP.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            own = Path(path.lstrip("/"))
            if not controllers:  # version 2
                yield from (CGROUPS / place / name for place in (own, *own.parents))
            elif controller in controllers.split(","):
                yield from (CGROUPS / controller / place / name_of_version_1 for place in (own, *own.parents))
