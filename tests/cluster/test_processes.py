"""Processes by number: gone, stopped, ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.cluster.processes import until
from tpqwen.executor import processes


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        yield process
        process.kill()


def test_a_running_process_is_neither_gone_nor_stopped(child):
    assert not processes.is_gone(child.pid)
    assert not processes.is_stopped(child.pid)


def test_a_stopped_process_is_known_and_can_be_ended(child):
    os.kill(child.pid, signal.SIGSTOP)
    until(lambda: processes.is_stopped(child.pid), "the stop")
    assert not processes.is_gone(child.pid)
    assert processes.kill(child.pid)
    assert processes.is_gone(child.pid)  # though nobody has waited for it yet
    assert not processes.is_stopped(child.pid)


def test_a_process_that_has_ended_is_gone_and_ending_it_again_is_no_error(child):
    child.kill()
    child.wait()
    assert processes.is_gone(child.pid)
    assert processes.kill(child.pid)
