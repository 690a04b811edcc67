"""Kernels compiled before they are launched, many at once, in a process of its own (kernels/build_worker.py).

Only Triton's cache on disk is filled. Whoever launches a kernel afterwards finds it there by a key over its source,
types, constants, options and compiler, or compiles it: nothing that goes wrong here makes a kernel wrong. Processes,
because threads that compile starve each other of the interpreter, and must not make launchers (docs/design.md). No
torch here until there is something to build: a rank starts that process before its own imports, which take as long.
"""

from __future__ import annotations

import logging
import math
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import copy
from pathlib import Path
from threading import Thread

from tpqwen.kernels.variant import END, Kernel
from tpqwen.machine import num_cpus

MOST = 32  # processes at a time; each has some 30 MB of its own, and a compiler at work
TIMEOUT_S = 120.0  # for the first ones, then for a sign of the others; the rest is compiled where it is launched
SPARSE = 16  # of the later launches, every so many-th is looked at where there is nothing to do for the first ones
NO_THREADS = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

_log = logging.getLogger(__name__)
Launch = Callable[[], object]


class Builder:
    """The process that compiles, from now until it is through, `close`, or the end of this process. Where it cannot be
    started, nothing is built.

    ranks: of the group, each of which has one. They share this machine's cores: a kernel for each at a time; half as
    many, at the lowest priority, of those that nobody waits for.
    """

    def __init__(self, ranks: int) -> None:
        width = max(1, min(num_cpus() // ranks, MOST))
        path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
        own = {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment = {**os.environ, **NO_THREADS, **own}
        command = [sys.executable, "-m", "tpqwen.kernels.build_worker", str(width)]
        pipe = subprocess.PIPE
        self._process: subprocess.Popen[str] | None = None
        try:
            self._process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, env=environment, process_group=0, text=True
            )
        except OSError as error:
            _log.warning("no process to compile kernels: %s", error)
        self._began = time.monotonic()
        self._sent = 0  # kernels
        self._later = 0  # launches beside the first ones whose kernels are sent
        self._marks = 0  # how far the process is: 1 with the first ones, one more with each of the later ones
        self._heard = self._began

    def build(self, first: Sequence[Launch], others: Sequence[Launch] = (), later: Sequence[Launch] = ()) -> None:
        """Compile what the first ones would launch, then, when nobody waits any more, what the others would. Meanwhile
        the later ones are gone through, one by one for as long as that takes no time of its own; theirs come last, and
        `built` tells of each. Where all of the first and the others is there already, and what the last of the later
        ones and a few before it take, nothing is done.

        Each kernel is sent as soon as it is known: to get as far as the next one, cuBLAS or cuDNN may have to start.
        """
        if self._process is None:
            return
        try:
            self._build(first, others, later)
        except BaseException:  # nobody is told of an end that does not come
            self.close()
            raise

    def _build(self, first: Sequence[Launch], others: Sequence[Launch], later: Sequence[Launch]) -> None:
        from tpqwen.kernels.recording import recorded

        with recorded(self._note):
            for launch in first:
                _unlaunched(launch)
            urgent = self._sent
            self._send("")
            for launch in (*others, *(() if urgent else later[::-SPARSE])):
                _unlaunched(launch)
            for launch in later if self._sent else ():
                if self._reached(1, 0.0):
                    break
                _unlaunched(launch)
                self._send("")
                self._later += 1
            self._send(END)
        if not self._sent:
            self.close()
        elif urgent:
            self._wait_for(urgent)

    def _wait_for(self, urgent: int) -> None:
        if not self._reached(1, TIMEOUT_S):
            _log.warning("kernels not compiled early: they take more than %.0f s", TIMEOUT_S)
            self.close()
        elif self._process is not None:
            seconds = time.monotonic() - self._began
            _log.info("kernels compiled=%d to come=%d seconds=%.2f", urgent, self._sent - urgent, seconds)

    def built(self, number: int, wait_s: float = 0.0) -> bool:
        """Whether the kernels of the first `number` later launches are compiled, or nobody is at work on them."""
        if self._reached(1 + number if number <= self._later else sys.maxsize, wait_s):
            return True
        if time.monotonic() - self._heard > TIMEOUT_S:
            _log.warning("kernels not compiled ahead: nothing came for %.0f s", TIMEOUT_S)
            self.close()
        return self._process is None

    def leave(self) -> None:
        """Nobody asks any more: the process ends by itself when it is through, or with this one."""
        if self._process is not None:
            other = copy(self)
            self._process = None
            Thread(target=other._reached, args=(sys.maxsize, math.inf), name="builder", daemon=True).start()

    def close(self) -> None:
        """Nothing is left of the process; what it has not compiled is given up. Idempotent."""
        process, self._process = self._process, None
        if process is None:
            return
        with suppress(ProcessLookupError):  # until it is waited for, its number is its own; its children may outlive it
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert process.stdin is not None and process.stdout is not None
        process.stdout.close()
        with suppress(BrokenPipeError):  # of lines that it has not read
            process.stdin.close()

    def _note(self, kernel: Kernel) -> None:
        if not kernel.is_cached():
            self._send(repr(tuple(kernel)))
            self._sent += 1

    def _send(self, line: str) -> None:
        if self._process is not None:
            assert self._process.stdin is not None
            with suppress(BrokenPipeError):  # `_reached` finds that it has ended
                self._process.stdin.write(f"{line}\n")
                self._process.stdin.flush()

    def _reached(self, marks: int, wait_s: float) -> bool:
        """Whether the process is as far as that, or has ended."""
        deadline = time.monotonic() + wait_s
        while self._process is not None and self._marks < marks:
            assert self._process.stdout is not None
            poll = select.poll()
            poll.register(self._process.stdout, select.POLLIN)
            left_ms = max(deadline - time.monotonic(), 0.0) * 1e3
            if not poll.poll(left_ms if left_ms < math.inf else None):
                return False
            data = os.read(self._process.stdout.fileno(), 4096)
            self._marks += data.count(b"\n")
            self._heard = time.monotonic()
            if not data:
                self._ended(self._process.pid)
        return True

    def _ended(self, pid: int) -> None:
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        seconds = time.monotonic() - self._began
        assert ended is not None, "it is waited for"
        if ended.si_code != os.CLD_EXITED:
            _log.warning("the process that compiles kernels was lost, signal=%d seconds=%.2f", ended.si_status, seconds)
        else:
            _log.info("kernels compiled=%d failed=%d seconds=%.2f", self._sent, ended.si_status, seconds)
        self.close()


def _unlaunched(launch: Launch) -> None:
    try:
        launch()
    except Exception as error:  # when it is launched for good, it is told
        _log.debug("not recorded: %s: %s", type(error).__name__, error)
