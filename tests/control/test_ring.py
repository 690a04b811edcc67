"""The shared-memory ring: order, wrap-around, many readers, dead readers, nothing left behind."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpqwen.transport.channel import QueueChannel, from_plain, open_channel, to_plain
from tpqwen.transport.ring import RingAddress, RingReader, RingWriter

# A reader process: attaches to argv[1], answers with a digest of what it read, ends at the writer's close.
READER = """
import hashlib, json, sys
import msgspec
from tpqwen.transport.ring import RingAddress, RingReader
reader = RingReader(msgspec.json.decode(sys.argv[1], type=RingAddress), spin_us=0)
print("attached", flush=True)
digest, count = hashlib.sha256(), 0
try:
    while True:
        data = reader.recv(30.0)
        if data is None:
            break
        digest.update(len(data).to_bytes(8, "little") + data)
        count += 1
except ConnectionError:
    print(count, digest.hexdigest(), flush=True)
"""


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def start_reader(address: RingAddress, processes: list[subprocess.Popen[str]]) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", READER, msgspec.json.encode(address).decode()]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    processes.append(process)
    return process


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def send_and_read(writer: RingWriter, reader: RingReader, times: int) -> None:
    for _ in range(times):
        writer.send(bytes(200), 0.2)
        reader.recv(0.0)


def pattern(index: int, size: int) -> bytes:
    return (index.to_bytes(4, "little") * (size // 4 + 1))[:size]


def send_all(writer: RingWriter, sizes: list[int]) -> None:
    for index, size in enumerate(sizes):
        writer.send(pattern(index, size), 5.0)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 60), min_size=1, max_size=80),
    capacity=st.integers(64, 257),
    seed=st.integers(0, 2**32),
)
def test_messages_come_out_whole_and_in_order_across_the_border(sizes, capacity, seed):
    turns = random.Random(seed)
    writer = RingWriter(2, capacity=capacity)
    readers = [RingReader(writer.address(i), spin_us=0) for i in range(2)]
    got: list[list[bytes]] = [[], []]
    left = list(enumerate(sizes))
    while any(len(g) < len(sizes) for g in got):
        try:
            if left:
                writer.send(pattern(*left[0]), 0.0)
                left.pop(0)
        except TimeoutError:
            assert any(writer.unread())
        for reader, taken in zip(readers, got, strict=True):
            if turns.random() < 0.6 and (data := reader.recv(0.0)) is not None:
                taken.append(data)
    expected = [pattern(i, size) for i, size in enumerate(sizes)]
    assert got == [expected, expected]
    assert writer.unread() == (0, 0)
    assert not readers[0].poll()


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(0, 900), min_size=1, max_size=20), capacity=st.integers(64, 257))
def test_messages_longer_than_the_ring_pass_in_parts(sizes, capacity):
    writer = RingWriter(1, capacity=capacity)
    reader = RingReader(writer.address(0), spin_us=0)
    thread = threading.Thread(target=send_all, args=(writer, sizes))
    thread.start()
    assert [reader.recv(5.0) for _ in sizes] == [pattern(i, size) for i, size in enumerate(sizes)]
    thread.join(5)
    assert writer.unread() == (0,)


def test_three_processes_read_the_same_messages(processes):
    writer = RingWriter(3, capacity=4096)
    readers = [start_reader(writer.address(i), processes) for i in range(3)]
    assert [line_of(r) for r in readers] == ["attached"] * 3
    digest = hashlib.sha256()
    sizes = [(i * 7919) % 900 for i in range(2000)] + [50_000, 0, 4092, 4093]
    for index, size in enumerate(sizes):
        data = pattern(index, size)
        digest.update(len(data).to_bytes(8, "little") + data)
        writer.send(data, 20.0)
    writer.close()
    assert [line_of(r) for r in readers] == [f"{len(sizes)} {digest.hexdigest()}"] * 3


def test_a_killed_reader_is_named_and_does_not_block_the_writer(processes):
    writer = RingWriter(2, capacity=1024)
    alive = RingReader(writer.address(0))
    victim = start_reader(writer.address(1), processes)
    assert line_of(victim) == "attached"
    victim.kill()
    victim.wait()
    begin = time.monotonic()
    with pytest.raises(TimeoutError, match=rf"reader 1 \(process {victim.pid}\)"):
        send_and_read(writer, alive, 20)
    assert time.monotonic() - begin < 5


def test_a_timeout_leaves_the_ring_usable_unless_a_long_message_was_cut_off():
    writer = RingWriter(1, capacity=64)
    reader = RingReader(writer.address(0))
    writer.send(bytes(50), 0.0)
    with pytest.raises(TimeoutError):
        writer.send(bytes(50), 0.01)
    assert reader.recv(0.0) == bytes(50)
    writer.send(b"next", 0.0)
    assert reader.recv(0.0) == b"next"
    with pytest.raises(TimeoutError):
        writer.send(bytes(1000), 0.01)
    with pytest.raises(ConnectionError):
        writer.send(b"", 0.01)


def test_recv_times_out_then_reads_what_comes_later():
    writer = RingWriter(1)
    reader = RingReader(writer.address(0))
    assert reader.recv(0.01) is None
    timer = threading.Timer(0.05, writer.send, (b"late", 1.0))
    timer.start()
    begin = time.monotonic()
    assert reader.recv(5.0) == b"late"
    assert time.monotonic() - begin < 2
    timer.join()


def test_close_lets_the_rest_be_read_then_ends():
    writer = RingWriter(1)
    reader = RingReader(writer.address(0))
    writer.send(b"last", 0.0)
    writer.close()
    writer.close()
    assert reader.recv(1.0) == b"last"
    with pytest.raises(ConnectionError):
        reader.recv(1.0)
    with pytest.raises(ConnectionError):
        writer.send(b"more", 0.0)


def test_closing_the_reader_wakes_its_sleeping_recv():
    writer = RingWriter(1)
    reader = RingReader(writer.address(0))
    timer = threading.Timer(0.05, reader.close)
    timer.start()
    with pytest.raises(ConnectionError):
        reader.recv(10.0)
    timer.join()


def test_unread_is_the_receipt_of_each_reader():
    writer = RingWriter(2)
    first, second = (RingReader(writer.address(i)) for i in range(2))
    writer.send(b"1234", 0.0)
    assert writer.unread() == (8, 8)
    first.recv(0.0)
    assert writer.unread() == (0, 8)
    second.recv(0.0)
    assert writer.unread() == (0, 0)
    assert writer.attached() == (os.getpid(), os.getpid())


def test_an_address_of_another_ring_or_epoch_is_refused():
    writer, other = RingWriter(1, epoch=1), RingWriter(1, epoch=1)
    address = writer.address(0)
    with pytest.raises(ConnectionError):
        RingReader(msgspec.structs.replace(address, epoch=2))
    with pytest.raises(ConnectionError):
        RingReader(msgspec.structs.replace(address, path=other.address(0).path))
    with pytest.raises(ConnectionError):
        RingReader(msgspec.structs.replace(address, path="/proc/self/fd/987654"))
    with pytest.raises(ConnectionError):
        RingReader(msgspec.structs.replace(address, reader=1))


def test_a_killed_writer_leaves_no_file_and_attached_readers_keep_the_data():
    code = """
import sys, time
from tpqwen.transport.ring import RingWriter
import msgspec
writer = RingWriter(1)
print(msgspec.json.encode(writer.address(0)).decode(), flush=True)
writer.send(b"before", 1.0)
print("sent", flush=True)
time.sleep(60)
"""
    before = set(Path("/dev/shm").glob("tpqwen-*")) if Path("/dev/shm").exists() else set()
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        address = msgspec.json.decode(line_of(process), type=RingAddress)
        assert line_of(process) == "sent"
        reader = RingReader(address)
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    assert reader.recv(0.0) == b"before"
    assert reader.recv(0.01) is None
    after = set(Path("/dev/shm").glob("tpqwen-*")) if Path("/dev/shm").exists() else set()
    assert after <= before
    with pytest.raises(ConnectionError):
        RingReader(address)


def test_the_descriptor_is_given_back_when_ring_and_readers_are_gone():
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")
    before = descriptors()
    for _ in range(20):
        writer = RingWriter(1, capacity=4096)
        reader = RingReader(writer.address(0))
        writer.send(b"x", 0.0)
        assert reader.recv(0.0) == b"x"
        writer.close()
        reader.close()
        del writer, reader
    assert descriptors() <= before


def test_addresses_travel_as_plain_values():
    writer = RingWriter(1)
    plain = to_plain(writer.address(0))
    assert plain is not None and plain["type"] == "ring"
    address = from_plain(plain)
    assert address == writer.address(0)
    assert address is not None
    reader = open_channel(address, 1.0)
    writer.send(b"hello", 0.0)
    assert reader.recv(1.0) == b"hello"
    assert to_plain(None) is None and from_plain(None) is None


def test_queue_channel_has_the_same_manners():
    channel = QueueChannel()
    assert channel.recv(0.0) is None and channel.recv(0.01) is None
    channel.send(b"a", 0.0)
    assert channel.poll()
    channel.close()
    assert channel.recv(0.0) == b"a"
    for _ in range(2):
        with pytest.raises(ConnectionError):
            channel.recv(1.0)
    with pytest.raises(ConnectionError):
        channel.send(b"b", 0.0)
