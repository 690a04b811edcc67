"""Memory and processors that a container may use are those that count, not the machine's."""

from __future__ import annotations

import os

import pytest

from tpqwen import machine
from tpqwen.machine import host_memory, num_cpus


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Sets this process's control groups, and the files below /sys/fs/cgroup."""
    monkeypatch.setattr(machine, "OWN_CGROUP", tmp_path / "own")
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "tree")

    def write(own, limits):
        (tmp_path / "own").write_text(own)
        for name, text in limits.items():
            file = tmp_path / "tree" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text + "\n")

    yield write
    (tmp_path / "own").unlink()
    assert host_memory() == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert num_cpus() == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("own", "limits", "expected"),
    [
        ("0::/\n", {"memory.max": "1048576"}, 1 << 20),
        ("0::/a.slice/b\n", {"a.slice/b/memory.max": "max", "a.slice/memory.max": "2097152"}, 2 << 20),
        ("0::/a.slice/b\n", {"a.slice/b/memory.max": "1048576", "a.slice/memory.max": "2097152"}, 1 << 20),
        ("0::/a/b\n", {"memory.max": "1048576", "other/memory.max": "4096"}, 1 << 20),  # a container's, whose root is b
        ("9:cpu:/x\n4:hugetlb,memory:/a\n0::/\n", {"memory/a/memory.limit_in_bytes": "1048576"}, 1 << 20),
        ("4:memory:/a\n", {"memory/memory.limit_in_bytes": "1048576"}, 1 << 20),
        ("0::/a\n", {"a/memory.max": "max", "memory.max": "max"}, None),
        ("4:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712"}, None),
        ("", {"memory.max": "4096"}, None),
    ],
)
def test_the_memory_of_the_own_control_group_and_those_above_it_counts(groups, own, limits, expected):
    groups(own, limits)
    assert host_memory() == (expected or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


@pytest.mark.parametrize(
    ("own", "limits", "expected"),
    [
        ("0::/\n", {"cpu.max": "400000 100000"}, 4),
        ("0::/\n", {"cpu.max": "150000 100000"}, 2),
        ("0::/\n", {"cpu.max": "1000 100000"}, 1),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "500000 100000"}, 5),
        ("3:cpu,cpuacct:/a\n0::/\n", {"cpu/a/cpu.cfs_quota_us": "300000", "cpu/a/cpu.cfs_period_us": "100000"}, 3),
        ("3:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("3:cpu:/\n", {"cpu/cpu.cfs_quota_us": "100000"}, None),
        ("0::/\n", {"cpu.max": "max 100000"}, None),
        ("0::/\n", {"cpu.max": "6400000 100000"}, None),
    ],
)
def test_processor_time_that_is_limited_counts_as_so_many_processors(groups, monkeypatch, own, limits, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    groups(own, limits)
    assert num_cpus() == (expected or 16)


def test_processors_that_this_process_may_not_run_on_do_not_count(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5})
    assert num_cpus() <= 2
