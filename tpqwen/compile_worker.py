"""The process that compiles grammars: it imports once, then forks a child with hard limits for every single one.

    python -m tpqwen.compile_worker FOLDER VOCAB_SIZE

Messages on stdin and stdout are msgpack behind a length of 4 bytes. A child that takes too long is killed, one that
takes too much memory dies of it; neither costs more than its own request.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import sys
import time
from pathlib import Path
from typing import BinaryIO

from tpqwen.grammar import GrammarError, Vocabulary
from tpqwen.structure import Done, Job, decode_done, decode_job, encode

PAGE = os.sysconf("SC_PAGE_SIZE")


def main(arguments: list[str]) -> None:
    """Serve jobs until stdin ends. The first message out, an empty Done, says that the process is ready."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ends with its owner, not with a Ctrl-C meant for that
    inbox, outbox = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not get between the messages
    vocabulary = Vocabulary(Path(arguments[0]), int(arguments[1]))
    send(outbox, encode(Done()))
    while (data := receive(inbox)) is not None:
        send(outbox, encode(run(decode_job(data), vocabulary)))


def send(stream: BinaryIO, data: bytes) -> None:
    """One message."""
    stream.write(len(data).to_bytes(4, "big") + data)
    stream.flush()


def receive(stream: BinaryIO) -> bytes | None:
    """The next message, None at the end."""
    head = stream.read(4)
    return stream.read(int.from_bytes(head, "big")) if len(head) == 4 else None


def run(job: Job, vocabulary: Vocabulary) -> Done:
    """Compile in a child of its own."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            _compile(job, vocabulary, writer)
        finally:
            os._exit(1)
    os.close(writer)
    data = _read(reader, time.monotonic() + job.timeout_s)
    os.close(reader)
    os.kill(child, signal.SIGKILL)  # it has ended, or it must
    _, status = os.waitpid(child, 0)
    if data is None:
        return Done(error=f"compiling it takes more than {job.timeout_s:g} s")
    if not data:
        slow = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU
        return Done(error=f"compiling it takes too much {'time' if slow else 'memory, or fails'}")
    return decode_done(data)


def _compile(job: Job, vocabulary: Vocabulary, writer: int) -> None:
    """The child: limits, work, answer."""
    seconds = int(job.timeout_s) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limit = _address_space() + job.memory_bytes
    if limit > job.memory_bytes:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        done = Done(vocabulary.compile(job.structure))
    except GrammarError as error:
        done = Done(error=str(error))
    except MemoryError:
        done = Done(error="compiling it takes too much memory")
    with os.fdopen(writer, "wb") as stream:
        stream.write(encode(done))


def _address_space() -> int:
    """Bytes mapped by this process, 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * PAGE
    except (OSError, ValueError):
        return 0


def _read(reader: int, deadline: float) -> bytes | None:
    """All that comes until the other end is closed; None when the deadline passes first."""
    parts: list[bytes] = []
    while (left := deadline - time.monotonic()) > 0:
        if select.select([reader], [], [], left)[0]:
            part = os.read(reader, 1 << 20)
            if not part:
                return b"".join(parts)
            parts.append(part)
    return None


if __name__ == "__main__":
    main(sys.argv[1:])
