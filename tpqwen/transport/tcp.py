"""The ring's interface over one TCP stream, for ranks on another node. Both directions share the connection.

A listener binds to one given address, and both sides prove a 128-bit secret (HMAC over each other's nonce) before the
first message. Messages are a 4-byte length and their bytes. A peer that falls silent is noticed within ten seconds.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import secrets
import select
import socket
import time
from dataclasses import dataclass, field

import msgspec

MAX_MESSAGE_BYTES = 256 * 1024 * 1024
_NONCE = 16
_PROOF = 32
_HELLO = 4 + _NONCE + _PROOF  # the dialler's: channel, nonce, proof
_PENDING = 64  # strangers that may be mute at the same time; the oldest is dropped for the next


class TcpAddress(msgspec.Struct, frozen=True, tag="tcp"):
    """Where and as whom to dial. secret: hexadecimal, never logged."""

    host: str
    port: int
    channel: int
    secret: str
    epoch: int

    def __repr__(self) -> str:
        return f"TcpAddress({self.host}:{self.port}, channel={self.channel}, epoch={self.epoch})"


class TcpChannel:
    """An authenticated connection: sender and receiver at once. One thread may send while another receives."""

    def __init__(self, connection: socket.socket, epoch: int = 0) -> None:
        self.epoch = epoch
        self._socket = connection
        _tune(connection)
        self._buffer = bytearray()

    def send(self, data: bytes, timeout_s: float) -> None:
        """Write one message. Raises TimeoutError when the peer takes nothing, ConnectionError when it is gone."""
        left = memoryview(len(data).to_bytes(4, "little") + data)
        deadline = time.monotonic() + timeout_s
        while left:
            try:
                left = left[self._socket.send(left) :]
            except BlockingIOError:
                if not _wait(self._socket, select.POLLOUT, deadline):
                    raise TimeoutError("the peer does not take what is sent to it") from None
            except OSError as error:
                raise ConnectionError(f"the peer is gone: {error}") from None

    def recv(self, timeout_s: float) -> bytes | None:
        """The next message, None after timeout_s. Raises ConnectionError when the peer is gone."""
        deadline = time.monotonic() + timeout_s
        while (message := self._message()) is None:
            if not _wait(self._socket, select.POLLIN, deadline):
                return None
            self._fill()
        return message

    def poll(self) -> bool:
        """Whether recv would find something to do at once."""
        return len(self._buffer) >= 4 or _wait(self._socket, select.POLLIN, 0.0)

    def close(self) -> None:
        """End both directions; a recv that sleeps raises. Idempotent."""
        with contextlib.suppress(OSError):  # perhaps not connected any more
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _fill(self) -> None:
        try:
            data = self._socket.recv(1 << 18)
        except BlockingIOError:
            return
        except OSError as error:
            raise ConnectionError(f"the peer is gone: {error}") from None
        if not data:
            raise ConnectionError("the peer has closed the connection")
        self._buffer += data

    def _message(self) -> bytes | None:
        if len(self._buffer) < 4:
            return None
        length = int.from_bytes(self._buffer[:4], "little")
        if length > MAX_MESSAGE_BYTES:
            raise ConnectionError(f"a message of {length} bytes is announced, the limit is {MAX_MESSAGE_BYTES}")
        if len(self._buffer) < 4 + length:
            return None
        message = bytes(self._buffer[4 : 4 + length])
        del self._buffer[: 4 + length]
        return message


@dataclass
class _Guest:
    """A connection that has not proved the secret yet."""

    connection: socket.socket
    nonce: bytes = field(default_factory=lambda: secrets.token_bytes(_NONCE))
    heard: bytearray = field(default_factory=bytearray)


class TcpListener:
    """Listens on one address of this node for a known number of channels of one epoch."""

    def __init__(self, host: str, *, epoch: int = 0) -> None:
        self._secret = secrets.token_bytes(16)
        self._epoch = epoch
        self._socket = socket.create_server((host, 0), backlog=128)
        self._socket.setblocking(False)

    def address(self, channel: int) -> TcpAddress:
        """What the dialler of `channel` needs."""
        host, port = self._socket.getsockname()[:2]
        return TcpAddress(host, port, channel, self._secret.hex(), self._epoch)

    def accept(self, channels: set[int], timeout_s: float) -> dict[int, TcpChannel]:
        """Wait until each of the channels has been dialled. Raises TimeoutError naming those that were not.

        Strangers are read side by side and dropped on the first wrong byte, so a mute one delays nobody.
        """
        deadline = time.monotonic() + timeout_s
        guests: list[_Guest] = []
        found: dict[int, TcpChannel] = {}
        try:
            while missing := channels - found.keys():
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError(f"channels {sorted(missing)} were not dialled within {timeout_s:g} s")
                ready, _, _ = select.select([self._socket, *(g.connection for g in guests)], [], [], left)
                if self._socket in ready:
                    self._greet(guests)
                for guest in [g for g in guests if g.connection in ready]:
                    self._hear(guest, guests, missing, found)
        except TimeoutError:
            for channel in found.values():
                channel.close()
            raise
        finally:
            for guest in guests:
                guest.connection.close()
        return found

    def close(self) -> None:
        """Stop listening; accepted channels live on."""
        self._socket.close()

    def _greet(self, guests: list[_Guest]) -> None:
        try:
            connection, _ = self._socket.accept()
        except OSError:
            return  # it left again
        connection.setblocking(False)
        guest = _Guest(connection)
        if not _sent(connection, guest.nonce):
            return
        guests.append(guest)
        if len(guests) > _PENDING:
            guests.pop(0).connection.close()

    def _hear(self, guest: _Guest, guests: list[_Guest], missing: set[int], found: dict[int, TcpChannel]) -> None:
        try:
            data = guest.connection.recv(_HELLO - len(guest.heard))
        except OSError:
            data = b""
        guest.heard += data
        if data and len(guest.heard) < _HELLO:
            return
        guests.remove(guest)
        hello = bytes(guest.heard)
        channel, nonce = int.from_bytes(hello[:4], "little"), hello[4 : 4 + _NONCE]
        expected = _proof(self._secret, b"dial", guest.nonce, hello[: 4 + _NONCE])
        right = hmac.compare_digest(hello[4 + _NONCE :], expected)
        if not right or channel not in missing or channel in found:
            guest.connection.close()
        elif _sent(guest.connection, _proof(self._secret, b"accept", nonce, hello[:4])):
            found[channel] = TcpChannel(guest.connection, self._epoch)


def dial(address: TcpAddress, timeout_s: float) -> TcpChannel:
    """Connect and prove the secret both ways. Raises ConnectionError or TimeoutError."""
    secret = bytes.fromhex(address.secret)
    deadline = time.monotonic() + timeout_s
    connection = socket.create_connection((address.host, address.port), timeout=timeout_s)
    try:
        theirs = _read(connection, _NONCE, deadline)
        hello = address.channel.to_bytes(4, "little") + secrets.token_bytes(_NONCE)
        connection.sendall(hello + _proof(secret, b"dial", theirs, hello))
        answer = _read(connection, _PROOF, deadline)
        if not hmac.compare_digest(answer, _proof(secret, b"accept", hello[4:], hello[:4])):
            raise ConnectionError(f"{address.host}:{address.port} does not know the group's secret")
    except BaseException:
        connection.close()
        raise
    return TcpChannel(connection, address.epoch)


def _proof(secret: bytes, side: bytes, nonce: bytes, rest: bytes) -> bytes:
    return hmac.new(secret, side + nonce + rest, hashlib.sha256).digest()


def _read(connection: socket.socket, size: int, deadline: float) -> bytes:
    data = b""
    while len(data) < size:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the other side does not answer the handshake")
        connection.settimeout(left)
        part = connection.recv(size - len(data))
        if not part:
            raise ConnectionError("the other side refused the handshake")
        data += part
    return data


def _sent(connection: socket.socket, data: bytes) -> bool:
    """Send the few bytes of a handshake; they fit into the socket's empty buffer."""
    try:
        connection.sendall(data)
    except OSError:
        connection.close()
        return False
    return True


def _wait(connection: socket.socket, event: int, deadline: float) -> bool:
    """Whether the event came before the deadline (monotonic seconds; 0 asks without waiting)."""
    poller = select.poll()
    try:
        poller.register(connection, event)
    except ValueError:
        raise ConnectionError("the connection was closed") from None
    return bool(poller.poll(max(0.0, deadline - time.monotonic()) * 1000))


def _tune(connection: socket.socket) -> None:
    connection.setblocking(False)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # Names that not every platform has: the first probe after 3 s, the peer given up after 9-10 s of silence.
    for name, value in (("TCP_KEEPIDLE", 3), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 10_000)):
        if (option := getattr(socket, name, None)) is not None:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
