"""The text process: `python -m tpqwen.text.worker FOLDER MAX_LEN` renders and tokenizes what comes on its stdin.

Frames both ways: a 4-byte little-endian length and msgpack. It ends with its stdin. A template gets RENDER_LIMIT_S, the
whole process MEMORY_BYTES above what it has after loading; whoever asks kills it when even that is not kept.
"""

from __future__ import annotations

import os
import resource
import signal
import struct
import sys
from types import FrameType
from typing import Any, BinaryIO

import msgspec

from tpqwen.errors import RequestError
from tpqwen.text.chat import ChatFormat
from tpqwen.text.tokenizer import Tokenizer
from tpqwen.text.work import Rendered, Renderer, Work

RENDER_LIMIT_S = 2.0
MEMORY_BYTES = 3 << 30


class Job(msgspec.Struct, frozen=True, array_like=True):
    """Arguments of Renderer.run."""

    work: Work
    truncate: int | None
    limited: bool


class Refusal(msgspec.Struct, frozen=True, tag="refusal"):
    """A RequestError on its way home."""

    message: str
    param: str | None
    code: str | None
    status: int


class Done(msgspec.Struct, frozen=True, tag="done"):
    rendered: Rendered


Answer = Done | Refusal

encode = msgspec.msgpack.Encoder().encode
decode_answer = msgspec.msgpack.Decoder(Answer).decode
_decode_job = msgspec.msgpack.Decoder(Job).decode


class _TimedTokenizer(Tokenizer):
    """Whose template may run for RENDER_LIMIT_S: an alarm interrupts Python code, and a template is Python code."""

    def render(self, messages: list[dict[str, Any]], **options: Any) -> str:
        signal.setitimer(signal.ITIMER_REAL, RENDER_LIMIT_S)
        try:
            return super().render(messages, **options)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)


def _too_slow(number: int, frame: FrameType | None) -> None:
    text = f"the chat template took longer than {RENDER_LIMIT_S:g} s for these messages"
    raise RequestError(text, param="messages", code="invalid_value")


def answer(renderer: Renderer, data: bytes) -> Answer:
    """Do one job; whatever it raises is told as a refusal."""
    job = _decode_job(data)
    try:
        return Done(renderer.run(job.work, job.truncate, job.limited).packed())
    except RequestError as error:
        return Refusal(str(error), error.param, error.code, error.status)
    except MemoryError:
        return Refusal("the prompt takes too much memory to be rendered", None, "invalid_value", 400)


def main() -> None:
    """Serve until stdin ends."""
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what anybody prints must not land among the frames
    signal.signal(signal.SIGALRM, _too_slow)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    chat = ChatFormat(_TimedTokenizer(sys.argv[1]))
    renderer = Renderer(chat, int(sys.argv[2]))
    assert chat.vocabulary.size
    _limit_memory()
    _send(sink, b"")  # ready
    while data := _receive(source):
        _send(sink, encode(answer(renderer, data)))


def _limit_memory() -> None:
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, resource.RLIM_INFINITY))


def _receive(source: BinaryIO) -> bytes:
    head = source.read(4)
    return source.read(struct.unpack("<I", head)[0]) if len(head) == 4 else b""


def _send(sink: BinaryIO, data: bytes) -> None:
    sink.write(struct.pack("<I", len(data)) + data)
    sink.flush()


if __name__ == "__main__":
    main()
