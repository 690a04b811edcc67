"""Shared-memory ring between processes of one node: one writer, many readers, whole messages of any length.

The ring is a stream of bytes: each message is a 4-byte length and its bytes, going round at the end. `head` counts
the bytes ever written, each reader's `tail` the bytes it has taken, which is also its receipt. Sleepers wait by futex
on the low half of those counters. The memory has no name in the file system (memfd): a kill leaves nothing behind.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import secrets
import struct
import sys
import tempfile
import time
from pathlib import Path

import msgspec

from tpqwen.machine import num_cpus

MAGIC = 0x31676E6972717074  # "tpqring1"
DEFAULT_CAPACITY = 4 * 1024 * 1024
MAX_READERS = 56

# Layout in bytes. What different processes write lies on different cache lines.
_HEADER = struct.Struct("<QQQQ16s")  # magic, epoch, capacity, readers, token
_CLOSED = 56
_HEAD = 64
_WRITER_WAITS = 128
_READERS = 256  # one line each: tail, pid
_LINE = 64
_DATA = 4096

_SLICE_S = 0.25  # longest sleep; bounds the cost of a wake-up that is lost where there is no futex
_FUTEX_NUMBER = {"x86_64": 202, "aarch64": 98}.get(platform.machine()) if sys.platform == "linux" else None
_FUTEX_WAIT, _FUTEX_WAKE = 0, 1
_STRONG_ORDER = platform.machine() in ("x86_64", "AMD64", "i686")


class RingAddress(msgspec.Struct, frozen=True, tag="ring"):
    """Where and as whom a reader of the same node attaches. token: proves that the memory is the one meant."""

    path: str
    token: str
    reader: int
    epoch: int


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


_libc = ctypes.CDLL(None, use_errno=True) if _FUTEX_NUMBER is not None else None


def default_spin_us() -> float:
    """How long a reader spins before it sleeps: not at all where cores are few."""
    return 20.0 if num_cpus() > 4 else 0.0


def _futex_wait(address: int, expected: int, timeout_s: float) -> None:
    """Sleep until woken, unless the 32-bit word at the address has changed. Releases the interpreter lock."""
    if _libc is None:
        time.sleep(min(timeout_s, 0.0003))
        return
    limit = _Timespec(int(timeout_s), int(timeout_s % 1 * 1e9))
    _libc.syscall(
        ctypes.c_long(_FUTEX_NUMBER or 0),
        ctypes.c_void_p(address),
        ctypes.c_int(_FUTEX_WAIT),
        ctypes.c_uint(expected & 0xFFFFFFFF),
        ctypes.byref(limit),
        ctypes.c_void_p(None),
        ctypes.c_int(0),
    )


def _futex_wake(address: int) -> None:
    """Wake all who sleep on the word. The kernel's wake path begins with a full memory barrier."""
    if _libc is not None:
        _libc.syscall(
            ctypes.c_long(_FUTEX_NUMBER or 0),
            ctypes.c_void_p(address),
            ctypes.c_int(_FUTEX_WAKE),
            ctypes.c_int(2**30),
            ctypes.c_void_p(None),
            ctypes.c_void_p(None),
            ctypes.c_int(0),
        )


class _Memory:
    """The mapped bytes and the counters in them. The mapping goes when the last object that uses it goes."""

    def __init__(self, fd: int, size: int) -> None:
        self._map = mmap.mmap(fd, size)
        self.bytes = memoryview(self._map)
        self._words = self.bytes[:_DATA].cast("Q")
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def load(self, offset: int) -> int:
        """One aligned 8-byte load, followed by a fence: data announced by a counter is read after the counter."""
        value = self._words[offset // 8]
        self._fence(offset)
        return value

    def store(self, offset: int, value: int) -> None:
        """One aligned 8-byte store, after a fence: the counter moves when the data is there."""
        self._fence(offset)
        self._words[offset // 8] = value

    def sleep(self, offset: int, seen: int, timeout_s: float) -> None:
        """Until the counter differs from `seen`, someone wakes us or the time is over."""
        _futex_wait(self._base + offset, seen, timeout_s)

    def wake(self, offset: int) -> None:
        _futex_wake(self._base + offset)

    def _fence(self, offset: int) -> None:
        # x86 keeps stores in order among stores and loads among loads, which is all the counters need. ARM does not,
        # and Python has no fence of its own: the futex system call's barrier serves.
        if not _STRONG_ORDER:
            _futex_wake(self._base + offset)


class RingWriter:
    """Creates the ring and writes to it; used by one thread. A message longer than the ring passes in parts."""

    def __init__(self, readers: int, *, capacity: int = DEFAULT_CAPACITY, epoch: int = 0) -> None:
        if not 1 <= readers <= MAX_READERS or capacity < 64:
            raise ValueError(f"a ring has 1..{MAX_READERS} readers and at least 64 bytes, not {readers} and {capacity}")
        self.epoch = epoch
        self._readers = readers
        self._capacity = capacity
        self._token = secrets.token_bytes(16)
        fd, self._path, self._unlink = _create_file(_DATA + capacity)
        self._fd: int | None = fd
        self._memory = _Memory(fd, _DATA + capacity)
        self._memory.bytes[: _HEADER.size] = _HEADER.pack(MAGIC, epoch, capacity, readers, self._token)
        self._head = 0
        self._torn = False

    def address(self, reader: int) -> RingAddress:
        """What reader number `reader` needs to attach; valid until all readers have."""
        if not 0 <= reader < self._readers:
            raise ValueError(f"reader {reader} of {self._readers}")
        return RingAddress(self._path, self._token.hex(), reader, self.epoch)

    def send(self, data: bytes, timeout_s: float) -> None:
        """Append one message. Raises TimeoutError, naming the slowest reader, when it leaves no room for timeout_s.

        A message that fits into the ring is written whole or not at all. If a longer one is cut off by the deadline,
        the ring is of no further use and every later send raises ConnectionError.
        """
        if self._torn:
            raise ConnectionError("the ring was closed, or a message in it was cut off")
        self._release_name()
        frame = memoryview(len(data).to_bytes(4, "little") + data)
        deadline = time.monotonic() + timeout_s
        if len(frame) <= self._capacity:
            self._wait_room(len(frame), deadline)
            self._append(frame)
            return
        step = max(self._capacity // 4, 8)
        for start in range(0, len(frame), step):
            part = frame[start : start + step]
            try:
                self._wait_room(len(part), deadline)
            except TimeoutError:
                self._torn = start > 0
                raise
            self._append(part)

    @property
    def written(self) -> int:
        """Bytes ever sent, lengths included."""
        return self._head

    def unread(self) -> tuple[int, ...]:
        """Bytes that each reader has not taken yet: 0 is a receipt for everything sent."""
        return tuple(self._head - self._memory.load(_READERS + _LINE * i) for i in range(self._readers))

    def attached(self) -> tuple[int, ...]:
        """Process id of each reader, 0 where none has attached yet."""
        return tuple(self._memory.load(_READERS + _LINE * i + 8) for i in range(self._readers))

    def close(self) -> None:
        """Tell the readers that nothing follows. Idempotent; what was sent can still be read."""
        self._torn = True
        self._memory.store(_CLOSED, 1)
        self._memory.wake(_HEAD)
        self._release_name(force=True)

    def __del__(self) -> None:
        if getattr(self, "_fd", None) is not None:
            self._release_name(force=True)

    def _append(self, part: memoryview) -> None:
        at = self._head % self._capacity
        first = min(len(part), self._capacity - at)
        target = self._memory.bytes
        target[_DATA + at : _DATA + at + first] = part[:first]
        if first < len(part):
            target[_DATA : _DATA + len(part) - first] = part[first:]
        self._head += len(part)
        self._memory.store(_HEAD, self._head)
        self._memory.wake(_HEAD)

    def _wait_room(self, size: int, deadline: float) -> None:
        """Until every reader has taken all but capacity - size bytes."""
        limit = self._capacity - size
        while (lag := max(unread := self.unread())) > limit:
            slowest = unread.index(lag)
            left = deadline - time.monotonic()
            if left <= 0:
                pid = self.attached()[slowest]
                who = f"reader {slowest} (process {pid})" if pid else f"reader {slowest}, which never attached,"
                raise TimeoutError(f"{who} is {lag} bytes behind in a ring of {self._capacity}")
            self._memory.store(_WRITER_WAITS, 1)
            # The reader looks at the flag after it has moved its tail; a wake-up lost between costs one short sleep.
            self._memory.sleep(_READERS + _LINE * slowest, self._head - lag, min(left, 0.01))
        self._memory.store(_WRITER_WAITS, 0)

    def _release_name(self, force: bool = False) -> None:
        if self._fd is None or not (force or all(self.attached())):
            return
        os.close(self._fd)
        self._fd = None
        if self._unlink:
            Path(self._path).unlink(missing_ok=True)


class RingReader:
    """One reader's end; used by one thread (close may come from another)."""

    def __init__(self, address: RingAddress, *, spin_us: float | None = None) -> None:
        """Attach. Raises ConnectionError when the ring is gone or is not the one the address means."""
        self.epoch = address.epoch
        self._memory, self._capacity = _attach(address)
        self._tail_at = _READERS + _LINE * address.reader
        self._tail = self._memory.load(self._tail_at)
        self._memory.store(self._tail_at + 8, os.getpid())
        self._spin_s = (default_spin_us() if spin_us is None else spin_us) / 1e6
        self._parts = bytearray()
        self._missing = 0  # bytes of the message in _parts that are still to come
        self._closed = False

    def poll(self) -> bool:
        """Whether something has arrived (perhaps a part of a long message)."""
        return self._memory.load(_HEAD) != self._tail

    def recv(self, timeout_s: float) -> bytes | None:
        """The next message, None after timeout_s. ConnectionError when the ring is closed and read to its end."""
        deadline = time.monotonic() + timeout_s
        while True:
            if self._closed:
                raise ConnectionError("the ring's reader was closed")
            if (message := self._take()) is not None:
                return message
            if not self._wait(deadline):
                return None

    def close(self) -> None:
        """Wake a recv that sleeps; it and later ones raise ConnectionError. Idempotent."""
        self._closed = True
        self._memory.wake(_HEAD)

    def _take(self) -> bytes | None:
        available = self._memory.load(_HEAD) - self._tail
        if not available:
            return None
        if not self._missing:
            length = int.from_bytes(self._copy(0, 4), "little")
            if available >= 4 + length:
                message = self._copy(4, length)
                self._advance(4 + length)
                return message
            self._parts = bytearray()
            self._missing = length
            self._advance(4)
            available -= 4
        size = min(available, self._missing)
        self._parts += self._copy(0, size)
        self._missing -= size
        self._advance(size)
        return None if self._missing else bytes(self._parts)

    def _copy(self, skip: int, size: int) -> bytes:
        at = (self._tail + skip) % self._capacity
        first = min(size, self._capacity - at)
        source = self._memory.bytes
        data = bytes(source[_DATA + at : _DATA + at + first])
        return data if first == size else data + bytes(source[_DATA : _DATA + size - first])

    def _advance(self, size: int) -> None:
        self._tail += size
        self._memory.store(self._tail_at, self._tail)
        if self._memory.load(_WRITER_WAITS):
            self._memory.wake(self._tail_at)

    def _wait(self, deadline: float) -> bool:
        """Whether something has arrived before the deadline."""
        if self._spin_s:
            until = time.perf_counter() + self._spin_s
            while not self.poll() and time.perf_counter() < until:
                pass
        while not self.poll():
            if self._memory.load(_CLOSED) and not self.poll():
                raise ConnectionError("the ring's writer has closed it")
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            self._memory.sleep(_HEAD, self._tail, min(left, _SLICE_S))
            if self._closed:
                return True
        return True


def _create_file(size: int) -> tuple[int, str, bool]:
    """(descriptor, path for other processes, whether the path must be unlinked). Only this user may open it."""
    name = f"tpqwen-{secrets.token_hex(8)}"
    if sys.platform == "linux":
        fd = os.memfd_create(name, os.MFD_CLOEXEC)
        os.fchmod(fd, 0o600)
        path, unlink = f"/proc/{os.getpid()}/fd/{fd}", False
    else:
        path, unlink = str(Path(tempfile.gettempdir()) / name), True
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.ftruncate(fd, size)
    return fd, path, unlink


def _attach(address: RingAddress) -> tuple[_Memory, int]:
    try:
        fd = os.open(address.path, os.O_RDWR | getattr(os, "O_CLOEXEC", 0))
    except OSError as error:
        raise ConnectionError(f"the ring's writer is gone: {error}") from None
    try:
        size = os.fstat(fd).st_size
        if size <= _DATA:
            raise ConnectionError("this is not a ring")
        memory = _Memory(fd, size)
    finally:
        os.close(fd)
    magic, epoch, capacity, readers, token = _HEADER.unpack(memory.bytes[: _HEADER.size])
    right = magic == MAGIC and token.hex() == address.token and epoch == address.epoch and address.reader < readers
    if not right or size != _DATA + capacity:
        raise ConnectionError("this is not the ring that the address means")
    return memory, capacity
