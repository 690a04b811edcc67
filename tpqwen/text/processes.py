"""Text work in processes of its own: it never takes the interpreter from the event loop, and it can be killed.

Two lanes, so that no short prompt stands behind a long one. A lane's process starts when it is first needed.
"""

from __future__ import annotations

import asyncio
import logging
import os
import select
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tpqwen.errors import EngineError, RequestError
from tpqwen.text.work import Rendered, Work, size_of
from tpqwen.text.worker import Answer, Job, Refusal, decode_answer, encode

LONG_FROM = 64 * 1024  # characters or ids
START_TIMEOUT_S = 60.0
BASE_TIMEOUT_S = 5.0
BYTES_PER_S = 100_000  # slower than any tokenizer on any machine that serves: what takes longer than this hangs

_log = logging.getLogger(__name__)


class TextProcesses:
    """Implements text.work.TextService."""

    def __init__(self, folder: Path, max_len: int) -> None:
        self._short = _Lane(folder, max_len)
        self._long = _Lane(folder, max_len)

    def start(self) -> None:
        """Start the short lane's process now instead of in the first request. Blocks. Raises EngineError."""
        self._short.start()

    async def render(self, work: Work, truncate: int | None = None, limited: bool = True) -> Rendered:
        lane = self._long if size_of(work) > LONG_FROM else self._short
        if lane.closed:
            raise EngineError("the server is shutting down", code="draining", status=503)
        answer = await lane.ask(encode(Job(work, truncate, limited)))
        if isinstance(answer, Refusal):
            raise RequestError(answer.message, param=answer.param, code=answer.code, status=answer.status)
        return answer.rendered

    def close(self) -> None:
        """End both processes. Idempotent."""
        self._short.close()
        self._long.close()


class _Lane:
    """One process and the one thread that talks to it, a job at a time."""

    def __init__(self, folder: Path, max_len: int) -> None:
        self._command = [sys.executable, "-m", "tpqwen.text.worker", str(folder), str(max_len)]
        self._thread = ThreadPoolExecutor(1, "text")
        self._process: subprocess.Popen[bytes] | None = None
        self.closed = False

    @property
    def pid(self) -> int | None:
        """Of the process, while there is one."""
        return self._process.pid if self._process is not None else None

    def start(self) -> None:
        self._thread.submit(self._living).result()

    async def ask(self, job: bytes) -> Answer:
        """The answer to a job. Raises RequestError when it was killed for its time or its memory."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._ask, job)

    def close(self) -> None:
        self.closed = True
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._end()

    def _ask(self, job: bytes) -> Answer:
        try:
            return self._try(job)
        except EOFError:  # it may have been killed by somebody else: once more, in a new one
            pass
        try:
            return self._try(job)
        except EOFError:
            raise RequestError("the prompt takes too much memory to be rendered", code="invalid_value") from None

    def _try(self, job: bytes) -> Answer:
        """Raises EOFError when the process ends over the job, RequestError when it takes too long and is killed."""
        process = self._living()
        deadline = time.monotonic() + BASE_TIMEOUT_S + len(job) / BYTES_PER_S
        try:
            _write(process, struct.pack("<I", len(job)) + job, deadline)
            found: Answer = decode_answer(_read(process, deadline))
            return found
        except TimeoutError:
            self._end()
            _log.warning("text process killed pid=%d reason=timeout", process.pid)
            raise RequestError("the prompt takes too long to be rendered", code="invalid_value") from None
        except (EOFError, OSError):
            self._end()
            _log.warning("text process ended pid=%d", process.pid)
            raise EOFError from None

    def _living(self) -> subprocess.Popen[bytes]:
        """The lane's process, started when there is none. Raises EngineError."""
        if self._process is None or self._process.poll() is not None:
            self._end()
            process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=_environment())
            for stream in (process.stdin, process.stdout):
                assert stream is not None
                os.set_blocking(stream.fileno(), False)
            self._process = process
            try:
                _read(process, time.monotonic() + START_TIMEOUT_S)
            except (EOFError, OSError) as error:
                self._end()
                raise EngineError(f"the text process did not start: {type(error).__name__}") from None
        return self._process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                assert stream is not None
                stream.close()


def _environment() -> dict[str, str]:
    """Ours, with this package to be found first and never the working directory."""
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}


def _write(process: subprocess.Popen[bytes], data: bytes, deadline: float) -> None:
    assert process.stdin is not None
    pipe, left = process.stdin.fileno(), memoryview(data)
    while left:
        _wait(pipe, select.POLLOUT, deadline)
        left = left[os.write(pipe, left) :]


def _read(process: subprocess.Popen[bytes], deadline: float) -> bytes:
    """One frame. Raises EOFError, TimeoutError."""
    assert process.stdout is not None
    pipe, data = process.stdout.fileno(), bytearray()
    while len(data) < 4 or len(data) < 4 + struct.unpack_from("<I", data)[0]:
        _wait(pipe, select.POLLIN, deadline)
        piece = os.read(pipe, 1 << 20)
        if not piece:
            raise EOFError
        data += piece
    return bytes(data[4:])


def _wait(pipe: int, event: int, deadline: float) -> None:
    poll = select.poll()
    poll.register(pipe, event)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1e3):
        raise TimeoutError
