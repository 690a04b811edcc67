"""Channels between an engine and its ranks: a shared-memory ring on one node, TCP streams to ranks elsewhere.

Three steps, each a call that some owner carries over: `Hub.addresses` go to the ranks, each rank's `join` gives back the
address of its answers, `Hub.connect` attaches to those.
"""

from __future__ import annotations

import socket
from typing import Any

from tpqwen.transport.channel import Receiver, Sender, from_plain, open_channel, to_plain
from tpqwen.transport.ring import RingWriter
from tpqwen.transport.tcp import TcpChannel, TcpListener

CONNECT_TIMEOUT_S = 30.0
Plain = dict[str, Any]


class Hub:
    """The engine's side. hosts: the node of each rank as its owner names it; here: the engine's own."""

    def __init__(self, hosts: list[str], here: str, *, epoch: int, interface: str = "127.0.0.1") -> None:
        local = [r for r, host in enumerate(hosts) if host == here]
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

    def connect(self, answers: list[Plain | None]) -> tuple[list[Sender], list[Receiver]]:
        """answers: each rank's reply to `join`. Returns the senders and, in rank order, the receivers."""
        streams: dict[int, TcpChannel] = {}
        if self._listener is not None:
            streams = self._listener.accept(self._remote, CONNECT_TIMEOUT_S)
            self._listener.close()
        senders: list[Sender] = [*([self._ring] if self._ring is not None else []), *streams.values()]
        receivers: list[Receiver] = []
        for rank, plain in enumerate(answers):
            address = from_plain(plain)
            receivers.append(
                streams[rank] if address is None else open_channel(address, CONNECT_TIMEOUT_S)  # a ring of the rank's own
            )
        return senders, receivers


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
    """The IPv4 address that a group binds to: loopback by default, else an address or this host's own by name."""
    if interface is None:
        return "127.0.0.1"
    return socket.gethostbyname(interface)
