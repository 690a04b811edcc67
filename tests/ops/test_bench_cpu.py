"""Which processes a word names: by what they call themselves, not by what they were told or where they lie."""

from __future__ import annotations

import os
import subprocess

import pytest

from tpqwen.bench import cpu


@pytest.mark.parametrize(
    ("argv0", "word", "named"),
    [
        ("/usr/sbin/haproxy", "haproxy", True),
        ("/opt/haproxy/bin/python", "haproxy", False),
        ("python", "haproxy", False),
        ("tpqwen rank 0/2", "tpqwen rank", True),
        ("ray::ProxyActor", "ProxyActor", True),
    ],
)
def test_a_word_names_a_binary_or_a_title_and_no_argument(argv0, word, named):
    command = [argv0, "-c", "echo started; read line", "serve --ingress haproxy", "tpqwen rank"]
    process = subprocess.Popen(command, executable="/bin/sh", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"started\n"  # before that it may have no command line yet
        assert (process.pid in cpu._seconds_of(word)) == named
    finally:
        process.communicate()


def test_a_process_that_has_ended_has_no_name():
    process = subprocess.Popen(["/bin/true"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert cpu.shown_name(process.pid) == ""
    process.wait()
    with pytest.raises(OSError):
        cpu.shown_name(process.pid)
