"""The process that compiles kernels: it imports once, then forks a child for every kernel.

    python -m tpqwen.kernels.build_worker WIDTH

Kernels come on stdin, one a line. An empty line is a mark: it is answered by one when all before it is compiled. Behind
the first mark nobody waits. END comes last; stdin stays open for as long as somebody wants the kernels. The exit status
is the number of kernels that failed. No GPU is touched: what to compile for is a part of each line.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import os
import select
import signal
import sys
import traceback
from collections import deque
from importlib import import_module
from threading import Thread

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver
from triton.runtime.cache import triton_key

from tpqwen.kernels.variant import END, Kernel, parse

MOST_TOLD = 100  # an exit status has 8 bits
LOWEST = 19  # priority
MODULES = ("tpqwen.kernels.cuda", "tpqwen.kernels.invariant")  # with all kernels, and PyTorch


def main(arguments: list[str]) -> int:
    """Compile what stdin names."""
    if os.getpgrp() != os.getpid():  # at the end all of the group is killed
        os.setpgid(0, 0)
    marks_to = os.dup(1)
    os.dup2(2, 1)  # what compilers print are no marks
    _prepare()
    width, waiting, begun = int(arguments[0]), deque[str](), b""
    running: dict[int, tuple[int, int]] = {}  # the pipe that ends with a child -> its process, and which kernel it is
    marks: deque[int] = deque()  # kernels before each that has not been answered
    started = answered = failed = 0
    while True:
        while waiting and waiting[0] != END:
            urgent = not marks and not answered
            if not waiting[0]:
                marks.append(started)
            elif len(running) < (width if urgent else max(1, width // 2)):
                child = _start(parse(waiting[0]), 0 if urgent else LOWEST, marks_to, patient=bool(running))
                if child is None:
                    break  # until one has ended
                running[child[0]] = child[1], started
                started += 1
            else:
                break
            waiting.popleft()
        while marks and marks[0] <= min((number for _, number in running.values()), default=started):
            marks.popleft()
            answered += 1
            os.write(marks_to, b"\n")
        if not running and list(waiting) == [END]:
            return min(failed, MOST_TOLD)
        ready, _, _ = select.select([0, *running], [], [])
        if 0 in ready:
            ready.remove(0)
            data = os.read(0, 1 << 16)
            if not data:  # whoever waited is gone
                os.killpg(0, signal.SIGKILL)
            *lines, begun = (begun + data).split(b"\n")
            waiting.extend(line.decode() for line in lines)
        for pipe in ready:
            os.close(pipe)
            failed += os.waitpid(running.pop(pipe)[0], 0)[1] != 0


def _prepare() -> None:
    """What every child needs: the kernels, and the compiler's own key, a hash over its files. No thread stays."""
    key = Thread(target=triton_key)
    key.start()
    for module in MODULES:
        import_module(module)
    key.join()


def _start(kernel: Kernel, niceness: int, closed: int, *, patient: bool) -> tuple[int, int] | None:
    """A child that compiles it: the pipe that ends with it, and its process. closed: what it must not hold open.

    patient: None where there can be no process now. Otherwise raises OSError then.
    """
    reader, writer = os.pipe()
    try:
        child = os.fork()
    except OSError:
        if not patient:
            raise
        os.close(reader)
        os.close(writer)
        return None
    if child == 0:
        try:
            os.close(closed)
            os.nice(niceness)
            compile_kernel(kernel)
            os._exit(0)
        except Exception as error:
            print(
                f"kernel {kernel.name} not compiled early: {type(error).__name__}: {error}", file=sys.stderr, flush=True
            )
        finally:
            os._exit(1)
    os.close(writer)
    return reader, child


def compile_kernel(kernel: Kernel) -> None:
    """Put it into Triton's cache, with the launcher that Triton 3.6 compiles for each signature."""
    target = GPUTarget(*kernel.target)
    compiled = triton.compile(kernel.source(), target=target, options=kernel.options)
    if hasattr(driver, "make_launcher"):
        driver.CudaLauncher(compiled.src, compiled.metadata)


if __name__ == "__main__":
    try:
        status = main(sys.argv[1:])
    except Exception:
        traceback.print_exc()
        os.killpg(0, signal.SIGKILL)  # children are in its group
    sys.exit(status)
