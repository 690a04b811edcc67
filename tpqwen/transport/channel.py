"""What a message channel is, whatever carries it: a ring, a TCP stream, or a queue within one process.

Errors are the built-in ones: TimeoutError for a deadline, ConnectionError for an end that is gone or closed.
"""

from __future__ import annotations

import queue
from typing import Any, Protocol

import msgspec

from tpqwen.transport.ring import RingAddress, RingReader
from tpqwen.transport.tcp import TcpAddress, TcpChannel, dial

Address = RingAddress | TcpAddress


class Sender(Protocol):
    """The writing end."""

    def send(self, data: bytes, timeout_s: float) -> None:
        """Raises TimeoutError when there is no room for timeout_s, ConnectionError when the channel is closed."""

    def close(self) -> None:
        """Nothing follows. Idempotent."""


class Receiver(Protocol):
    """The reading end. Messages come in the order sent, none twice."""

    def recv(self, timeout_s: float) -> bytes | None:
        """The next message, None after timeout_s; ConnectionError when the other end is gone and all is read."""

    def poll(self) -> bool:
        """Whether recv would have something to read at once."""

    def close(self) -> None:
        """A recv that waits raises ConnectionError. Idempotent."""


class QueueChannel:
    """Both ends of a channel between two threads of one process."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._closed = False

    def send(self, data: bytes, timeout_s: float) -> None:
        """Never waits: what one process holds is bounded by admission."""
        del timeout_s
        if self._closed:
            raise ConnectionError("the channel is closed")
        self._queue.put(data)

    def recv(self, timeout_s: float) -> bytes | None:
        try:
            data = self._queue.get(timeout=timeout_s) if timeout_s > 0 else self._queue.get_nowait()
        except queue.Empty:
            return None
        if data is None:
            self._queue.put(None)
            raise ConnectionError("the channel is closed")
        return data

    def poll(self) -> bool:
        return not self._queue.empty()

    def close(self) -> None:
        self._closed = True
        self._queue.put(None)


def open_channel(address: Address, timeout_s: float) -> RingReader | TcpChannel:
    """The other end of a channel made in another process. A TcpChannel also sends. Raises ConnectionError."""
    if isinstance(address, RingAddress):
        return RingReader(address)
    return dial(address, timeout_s)


def to_plain(address: Address | None) -> dict[str, Any] | None:
    """The address as a dictionary of plain values, to pass to another process."""
    return None if address is None else msgspec.to_builtins(address)


def from_plain(plain: dict[str, Any] | None) -> Address | None:
    """The inverse of to_plain."""
    return None if plain is None else msgspec.convert(plain, RingAddress | TcpAddress)
