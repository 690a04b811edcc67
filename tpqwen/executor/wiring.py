"""Channels between an engine and its ranks: a shared-memory ring on one node, TCP streams to ranks elsewhere.

Three steps, each a call that some owner carries over: `Hub.addresses` go to the ranks, each rank's `join` gives back
the address of its answers, `Hub.connect` attaches to those.
"""

from __future__ import annotations

import fcntl
import socket
import struct
import sys
from dataclasses import dataclass
from typing import Any

from tpqwen.errors import ConfigError
from tpqwen.transport.channel import Receiver, Sender, from_plain, open_channel, to_plain
from tpqwen.transport.ring import RingWriter
from tpqwen.transport.tcp import TcpChannel, TcpListener

CONNECT_TIMEOUT_S = 30.0
Plain = dict[str, Any]
_SIOCGIFADDR = 0x8915


@dataclass(frozen=True)
class Links:
    """What the engine holds of its ranks: senders (the ring, then one stream per remote rank) and each one's receiver.

    local: the ranks of this node, in the order of the ring's readers.
    """

    senders: list[Sender]
    receivers: list[Receiver]
    ring: RingWriter | None
    local: list[int]

    def processes(self) -> dict[int, int]:
        """Rank -> process id, for the ranks of this node."""
        return {} if self.ring is None else dict(zip(self.local, self.ring.attached(), strict=True))

    def written(self) -> int:
        """A mark behind what has been sent to the ranks of this node so far."""
        return 0 if self.ring is None else self.ring.written

    def silent(self, mark: int) -> list[int]:
        """The ranks of this node that have not taken everything that was sent before the mark."""
        if self.ring is None:
            return []
        behind = self.ring.written - mark
        return [r for r, n in zip(self.local, self.ring.unread(), strict=True) if n > behind]

    def close(self) -> None:
        """End all channels; the ranks' loops end. Idempotent."""
        for sender in self.senders:
            sender.close()
        for receiver in self.receivers:
            receiver.close()


class Hub:
    """The engine's side. hosts: the node of each rank as its owner names it; here: the engine's own."""

    def __init__(self, hosts: list[str], here: str, *, epoch: int, interface: str = "127.0.0.1") -> None:
        local = self._local = [r for r, host in enumerate(hosts) if host == here]
        self._remote = {r for r, host in enumerate(hosts) if host != here}
        self._ring = RingWriter(len(local), epoch=epoch) if local else None
        self._listener = TcpListener(interface, epoch=epoch) if self._remote else None
        self.addresses: list[Plain | None] = []
        for rank in range(len(hosts)):
            if rank in self._remote:
                assert self._listener is not None
                self.addresses.append(to_plain(self._listener.address(rank)))
            else:
                assert self._ring is not None
                self.addresses.append(to_plain(self._ring.address(local.index(rank))))

    def connect(self, answers: list[Plain | None]) -> Links:
        """answers: each rank's reply to `join`. Raises ConnectionError or TimeoutError."""
        streams: dict[int, TcpChannel] = {}
        if self._listener is not None:
            streams = self._listener.accept(self._remote, CONNECT_TIMEOUT_S)
            self._listener.close()
        senders: list[Sender] = [*([self._ring] if self._ring is not None else []), *streams.values()]
        receivers: list[Receiver] = []
        for rank, plain in enumerate(answers):
            address = from_plain(plain)  # of a ring of the rank's own, None for a stream
            receivers.append(streams[rank] if address is None else open_channel(address, CONNECT_TIMEOUT_S))
        return Links(senders, receivers, self._ring, self._local)


def join(address: Plain, *, epoch: int) -> tuple[Receiver, Sender, Plain | None]:
    """The rank's side: its inbox, its outbox, and the outbox's address (None: the TCP stream carries both ways)."""
    found = from_plain(address)
    assert found is not None
    inbox = open_channel(found, CONNECT_TIMEOUT_S)
    if isinstance(inbox, TcpChannel):
        return inbox, inbox, None
    outbox = RingWriter(1, epoch=epoch, capacity=1 << 20)
    return inbox, outbox, to_plain(outbox.address(0))


def interface_address(interface: str | None) -> str:
    """The IPv4 address that a group binds to: of the named network interface, loopback by default.

    Raises ConfigError when there is no such interface or it has no address.
    """
    if interface is None:
        return "127.0.0.1"
    if sys.platform != "linux":
        return socket.gethostbyname(interface)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            found = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError as error:
            names = ", ".join(name for _, name in socket.if_nameindex())
            raise ConfigError(f"interface {interface!r}: {error.strerror}; this host has {names}") from None
    return socket.inet_ntoa(found[20:24])
