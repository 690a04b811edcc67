"""The TCP channel: the ring's manners, a secret handshake, strangers that delay nobody."""

from __future__ import annotations

import socket
import threading
import time

import msgspec
import pytest

from tpqwen.transport.channel import open_channel
from tpqwen.transport.tcp import TcpChannel, TcpListener, dial


def pair() -> tuple[TcpChannel, TcpChannel]:
    listener = TcpListener("127.0.0.1", epoch=3)
    dialled: list[TcpChannel] = []
    thread = threading.Thread(target=lambda: dialled.append(dial(listener.address(7), 5.0)))
    thread.start()
    accepted = listener.accept({7}, 5.0)[7]
    thread.join(5)
    listener.close()
    return accepted, dialled[0]


def send_often(channel: TcpChannel, times: int) -> None:
    for _ in range(times):
        channel.send(bytes(1_000_000), 0.1)


def test_messages_of_all_sizes_pass_both_ways():
    a, b = pair()
    sizes = [0, 1, 3, 4, 5, 1000, 70_000, 3_000_000, 2]
    thread = threading.Thread(target=lambda: [a.send(bytes([i]) * n, 10.0) for i, n in enumerate(sizes)])
    thread.start()
    assert [b.recv(10.0) for _ in sizes] == [bytes([i]) * n for i, n in enumerate(sizes)]
    thread.join(5)
    b.send(b"back", 1.0)
    assert a.recv(5.0) == b"back"
    assert a.recv(0.0) is None and not a.poll()
    assert a.epoch == b.epoch == 3
    a.close()
    b.close()


def test_a_closed_peer_raises_after_the_rest_is_read():
    a, b = pair()
    a.send(b"last", 1.0)
    a.close()
    assert b.recv(5.0) == b"last"
    with pytest.raises(ConnectionError):
        b.recv(5.0)
    b.close()
    with pytest.raises(ConnectionError):
        b.recv(0.0)


def test_a_peer_that_takes_nothing_times_out():
    a, b = pair()
    begin = time.monotonic()
    with pytest.raises(TimeoutError):
        send_often(a, 100)
    assert time.monotonic() - begin < 10
    a.close()
    b.close()


def test_mute_and_wrong_strangers_neither_enter_nor_delay():
    listener = TcpListener("127.0.0.1")
    host, port = listener.address(0).host, listener.address(0).port
    strangers = [socket.create_connection((host, port)) for _ in range(5)]
    strangers[0].sendall(b"x" * 200)
    accepted: dict[int, TcpChannel] = {}
    thread = threading.Thread(target=lambda: accepted.update(listener.accept({1, 2}, 10.0)))
    begin = time.monotonic()
    thread.start()
    with pytest.raises(ConnectionError):
        dial(msgspec.structs.replace(listener.address(1), secret="00" * 16), 5.0)
    with pytest.raises(ConnectionError):
        dial(listener.address(9), 5.0)
    channels = [open_channel(listener.address(i), 5.0) for i in (2, 1)]
    thread.join(10)
    assert sorted(accepted) == [1, 2]
    assert time.monotonic() - begin < 5
    accepted[1].send(b"one", 1.0)
    assert channels[1].recv(5.0) == b"one"
    for s in [*strangers, *channels, *accepted.values(), listener]:
        s.close()


def test_missing_channels_are_named_and_the_secret_is_not_shown():
    listener = TcpListener("127.0.0.1")
    with pytest.raises(TimeoutError, match=r"\[4\]"):
        listener.accept({4}, 0.05)
    address = listener.address(4)
    assert address.secret not in repr(address)
    listener.close()
