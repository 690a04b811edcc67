"""Grammars for the HTTP layer: compiled in a process of its own, remembered in memory, off the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import sys
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from tpqwen.errors import EngineError, Overloaded, RequestError
from tpqwen.structure import Job, Structure, decode_done, encode

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CompileLimits:
    """What one grammar may take, how many may wait for theirs, and how many bytes of compiled ones are kept."""

    timeout_s: float = 2.0
    memory_bytes: int = 512 << 20
    max_waiting: int = 64
    cache_bytes: int = 64 << 20
    start_s: float = 120.0  # importing xgrammar and reading the vocabulary, on a busy machine
    grace_s: float = 10.0  # beyond timeout_s, until the process itself counts as hung


class GrammarService:
    """Implements structure.Compiler. All methods belong to one event loop.

    One compilation at a time; the same structure asked for twice is compiled once. The process is started by `start` or
    the first use, and again when it was lost.
    """

    def __init__(self, folder: Path, vocab_size: int, limits: CompileLimits | None = None) -> None:
        self.limits = limits or CompileLimits()
        self._command = (sys.executable, "-m", "tpqwen.compile_worker", str(folder), str(vocab_size))
        self._lock = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None
        self._known: OrderedDict[bytes, bytes] = OrderedDict()
        self._known_bytes = 0
        self._running: dict[bytes, asyncio.Task[bytes]] = {}

    async def start(self) -> None:
        """Start the process now, so that the first request does not wait for it. Failing is that request's matter."""
        async with self._lock:
            try:
                await self._ready()
            except EngineError:
                _log.exception("grammars cannot be compiled")

    async def compile(self, structure: Structure, param: str) -> bytes:
        """The compiled grammar. Raises RequestError naming `param`, Overloaded when too many wait."""
        key = hashlib.sha256(encode(structure)).digest()
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key]
        task = self._running.get(key)
        if task is None:
            if len(self._running) >= self.limits.max_waiting:
                raise Overloaded(f"{len(self._running)} grammars are waiting to be compiled", code="queue_full")
            task = asyncio.create_task(self._compile(structure))
            self._running[key] = task
            task.add_done_callback(lambda done: self._finished(key, done))
        try:
            return await asyncio.shield(task)  # whoever leaves must not take the others' along
        except ValueError as error:
            raise RequestError(f"{param}: {error}", param=param, code="invalid_value") from None

    async def close(self) -> None:
        """End the process."""
        for task in self._running.values():
            task.cancel()
        await self._stop()

    def _finished(self, key: bytes, task: asyncio.Task[bytes]) -> None:
        del self._running[key]
        if task.cancelled() or task.exception() is not None:
            return
        self._known[key] = task.result()
        self._known_bytes += len(task.result())
        while self._known_bytes > self.limits.cache_bytes and len(self._known) > 1:
            self._known_bytes -= len(self._known.popitem(last=False)[1])

    async def _compile(self, structure: Structure) -> bytes:
        """Raises ValueError with the reason, EngineError when there is no process to ask."""
        async with self._lock:
            process = await self._ready()
            job = encode(Job(structure, self.limits.timeout_s, self.limits.memory_bytes))
            try:
                async with asyncio.timeout(self.limits.timeout_s + self.limits.grace_s):
                    done = decode_done(await _ask(process, job))
            except (TimeoutError, OSError, EOFError) as error:
                await self._stop()
                _log.warning("the compiling process was lost reason=%s", type(error).__name__)
                raise EngineError("the process that compiles grammars was lost", code="internal") from None
        if done.error:
            raise ValueError(done.error)
        return done.compiled

    async def _ready(self) -> asyncio.subprocess.Process:
        if self._process is not None and self._process.returncode is None:
            return self._process
        # The same code as ours, wherever that came from. A GPU is none of its business; threads do not survive forks.
        path = os.pathsep.join(p for p in sys.path if p)
        environment = os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(*self._command, stdin=pipe, stdout=pipe, env=environment)
        self._process = process
        try:
            async with asyncio.timeout(self.limits.start_s):
                await _receive(process)
        except (TimeoutError, EOFError) as error:
            await self._stop()
            raise EngineError("the process that compiles grammars does not start", code="internal") from error
        return process

    async def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


async def _ask(process: asyncio.subprocess.Process, data: bytes) -> bytes:
    assert process.stdin is not None
    process.stdin.write(len(data).to_bytes(4, "big") + data)
    await process.stdin.drain()
    return await _receive(process)


async def _receive(process: asyncio.subprocess.Process) -> bytes:
    """The next message. Raises EOFError (asyncio.IncompleteReadError) at the end."""
    assert process.stdout is not None
    head = await process.stdout.readexactly(4)
    return await process.stdout.readexactly(int.from_bytes(head, "big"))
