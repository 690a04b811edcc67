"""A client whose host is cut off in mid stream: no FIN, no RST, its packets just vanish. Behind the shipped nginx the
request ends within seconds and its pages are free. Needs root, iproute2 and nginx."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts.namespaces import ip, possible
from tests.http.live import completion, live, until
from tests.http.test_clients import finished, running
from tests.ops.test_front_proxy import NGINX, front

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

BRIDGE, PORT, FILLER, NAME = "tpqg0", "tpqg1", "tpqg2", "tpqgone"
SERVER, CLIENT = "10.213.78.1", "10.213.78.2"
READER = """
import socket, sys
client = socket.create_connection((sys.argv[1], int(sys.argv[2])))
client.sendall(sys.stdin.buffer.read())
while data := client.recv(65536):
    print(len(data), flush=True)
"""


@pytest.fixture
def lan() -> Iterator[None]:
    """A bridge of this host with one other host on it, NAME. The bridge stays up when that one is cut off."""
    try:
        ip("netns", "add", NAME)
        ip("link", "add", BRIDGE, "type", "bridge")
        for name, peer in ((PORT, "eth0"), (FILLER, "eth1")):
            ip("link", "add", name, "type", "veth", "peer", "name", peer, "netns", NAME)
            ip("-n", NAME, "link", "set", peer, "up")
        ip("addr", "add", f"{SERVER}/24", "dev", BRIDGE)
        for name in (BRIDGE, FILLER, PORT):
            ip("link", "set", name, *(() if name == BRIDGE else ("master", BRIDGE)), "up")
        ip("-n", NAME, "addr", "add", f"{CLIENT}/24", "dev", "eth0")
        yield
    finally:
        for name in (PORT, FILLER, BRIDGE):
            ip("link", "del", name, check=False)
        ip("netns", "del", NAME, check=False)


def test_a_client_that_vanishes_in_mid_stream_frees_its_pages(lan: None, tmp_path: Path) -> None:
    assert possible() and NGINX is not None, "needs root, iproute2 and nginx"
    with live(comment_every_s=0.5) as server, front(tmp_path / "nginx", server.port, SERVER, send_timeout="2s") as port:
        words = ["ip", "netns", "exec", NAME, sys.executable, "-c", READER, SERVER, str(port)]
        pipe = subprocess.PIPE
        with subprocess.Popen(words, stdin=pipe, stdout=pipe) as client:
            assert client.stdin is not None and client.stdout is not None
            client.stdin.write(completion(max_tokens=35_000, stream=True))
            client.stdin.close()
            assert client.stdout.readline() and running(server) == 1
            ip("link", "set", PORT, "down")
            until(lambda: finished(server) == ["abort"], 30)
            server.until_idle()
            assert client.poll() is None  # it has heard nothing, and still waits
            client.kill()
