"""Kernels compiled before they are launched, all at once, each in a process of its own (build_worker.py).

Only Triton's cache on disk is filled. Whoever launches a kernel afterwards finds it there by a key over its source,
types, constants, options and compiler, or compiles it: nothing that goes wrong here makes a kernel wrong. Processes,
because threads that compile starve each other of the interpreter, and must not make launchers (docs/design.md).
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from triton import knobs
from triton.runtime import driver

from tpqwen.kernels.variant import Kernel, parse

MOST = 32  # processes at a time; each has some 30 MB of its own, and a compiler at work
TIMEOUT_S = 120.0  # for all of it; what is not there by then is compiled where it is launched
NO_THREADS = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

_log = logging.getLogger(__name__)
Launch = Callable[[], object]
Build = Callable[[Sequence[Launch]], None]


def _noted(call: dict[str, Any]) -> str:
    """The repr of the kernel that Triton's hook is told of."""
    compiled, target = call["compile"], driver.active.get_current_target()
    stored = json.loads(compiled["specialization_data"])["options"]  # JSON has no tuples
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()}
    where = (target.backend, target.arch, target.warp_size)
    types = (compiled["signature"], compiled["constants"], compiled["configs"][0])
    return repr((call["fn"].module, call["fn"].name, *types, options, where))


class _Zeroed(TorchFunctionMode):
    """Memory is zero where it would be left as it is: what a kernel that is not launched should have written."""

    UNWRITTEN = frozenset({torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result.zero_() if func in self.UNWRITTEN else result


@contextmanager
def recorded(note: Callable[[Kernel], None]) -> Iterator[None]:
    """Kernels that this thread would have to compile or read are noted, each once, and not launched. What cannot be
    written as literals is left out."""
    seen: set[str] = set()
    thread, before = threading.get_ident(), knobs.runtime.jit_cache_hook

    def hook(**call: Any) -> bool:
        if threading.get_ident() != thread:
            return before is not None and bool(before(**call))
        line = _noted(call)
        if line not in seen:
            seen.add(line)
            try:
                kernel = parse(line)
            except ValueError:
                _log.debug("kernel %s takes more than literals", call["fn"].name)
            else:
                note(kernel)
        return True

    knobs.runtime.jit_cache_hook = hook
    try:
        with _Zeroed():
            yield
    finally:
        knobs.runtime.jit_cache_hook = before


@contextmanager
def building(width: int) -> Iterator[Build]:
    """Start the process that will compile, at most `width` kernels at a time, and give what waits for it. At the end of
    the body nothing is left of it; it also ends with this process. Where it cannot be started, nothing is built."""
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, **NO_THREADS, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tpqwen.kernels.build_worker", str(max(1, min(width, MOST)))]
    inbox, nowhere = subprocess.PIPE, subprocess.DEVNULL
    try:
        process = subprocess.Popen(command, stdin=inbox, stdout=nowhere, env=environment, process_group=0, text=True)
    except OSError as error:
        _log.warning("no process to compile kernels: %s", error)
        yield lambda launches: None
        return
    try:
        yield partial(_build, process)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # of lines that it has not read
            process.stdin.close()


def _build(process: subprocess.Popen[str], launches: Sequence[Launch]) -> None:
    """Each kernel is sent as soon as it is known: to get as far as the next one, cuBLAS or cuDNN may have to start."""
    began, sent = time.monotonic(), 0

    def send(line: str) -> None:
        assert process.stdin is not None
        process.stdin.write(f"{line}\n")
        process.stdin.flush()

    def note(kernel: Kernel) -> None:
        nonlocal sent
        if not kernel.is_cached():
            send(repr(tuple(kernel)))
            sent += 1

    with recorded(note):
        for launch in launches:
            try:
                launch()
            except Exception as error:  # when it is launched for good, it is told
                _log.debug("not recorded: %s: %s", type(error).__name__, error)
    if sent:
        send("")
        failed = process.wait(TIMEOUT_S)
        seconds = time.monotonic() - began
        if failed < 0:
            _log.warning("the process that compiles kernels was lost, signal=%d seconds=%.2f", -failed, seconds)
        else:
            _log.info("kernels compiled=%d failed=%d seconds=%.2f", sent, failed, seconds)
