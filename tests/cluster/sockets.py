"""Who listens where, from /proc, and whether a listener speaks gRPC."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

LISTEN = "0A"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"  # HTTP/2's first bytes and empty settings
SETTINGS = 4


class Listener(NamedTuple):
    pid: int
    host: str
    port: int

    @property
    def is_loopback(self) -> bool:
        return self.host.startswith("127.") or self.host == "::1"


def listeners(pids: Iterable[int]) -> list[Listener]:
    """TCP sockets that these processes listen on."""
    sockets = _listening()
    return sorted({Listener(pid, *sockets[inode]) for pid in pids for inode in _inodes(pid) if inode in sockets})


def speaks_grpc(port: int) -> bool:
    """Whether an HTTP/2 server answers on this machine."""
    with socket.create_connection((_own_address(), port), timeout=10) as peer:
        peer.sendall(PREFACE)
        try:
            frame = peer.recv(9)
        except OSError:
            return False
    return len(frame) == 9 and frame[3] == SETTINGS


def _listening() -> dict[int, tuple[str, int]]:
    """inode -> (address, port)"""
    found = {}
    for path, family in (("/proc/net/tcp", socket.AF_INET), ("/proc/net/tcp6", socket.AF_INET6)):
        for line in Path(path).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTEN:
                host, port = fields[1].split(":")
                found[int(fields[9])] = (_address(bytes.fromhex(host), family), int(port, 16))
    return found


def _address(raw: bytes, family: int) -> str:
    """The kernel prints addresses as 32-bit words in the machine's order."""
    words = [raw[i : i + 4][::-1] for i in range(0, len(raw), 4)]
    return socket.inet_ntop(family, b"".join(words))


def _inodes(pid: int) -> list[int]:
    inodes = []
    try:
        for entry in os.scandir(f"/proc/{pid}/fd"):
            target = os.readlink(entry.path)
            if target.startswith("socket:["):
                inodes.append(int(target[8:-1]))
    except OSError:
        return inodes
    return inodes


def _own_address() -> str:
    """An address of this machine that is not loopback where there is one: what strangers would use."""
    try:
        return next(a for a in socket.gethostbyname_ex(socket.gethostname())[2] if not a.startswith("127."))
    except (OSError, StopIteration):
        return "127.0.0.1"
