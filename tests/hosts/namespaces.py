"""Hosts made of network namespaces on one machine: a bridge, and a Ray node in each. Needs root and iproute2."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.cluster.processes import children_of, until

LINK = "tpq0"  # the same name on every host: options name interfaces, not addresses
SUBNET = "10.213.77."
PORT = 26379
RAY = str(Path(sys.executable).with_name("ray"))
# A lost node is declared dead after about 8 s instead of 64.
SETTINGS = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}


def possible() -> bool:
    """Whether this user may make network namespaces here."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    done = subprocess.run(["unshare", "-n", "true"], capture_output=True, check=False)
    return done.returncode == 0


def ip(*words: str, check: bool = True) -> None:
    subprocess.run(["ip", *words], check=check, capture_output=True)


class Host:
    """One namespace with a Ray node that offers one unit of the resource `rank`."""

    def __init__(self, number: int, folder: str) -> None:
        self.name = f"tpqhost{number}"
        self.address = f"{SUBNET}{10 + number}"
        self._veth = f"tpqv{number}"
        self.log = Path(folder) / f"{self.name}.log"
        self._process: subprocess.Popen[bytes] | None = None
        ip("netns", "add", self.name)
        ip("link", "add", self._veth, "type", "veth", "peer", "name", LINK, "netns", self.name)
        ip("link", "set", self._veth, "master", LINK, "up")
        ip("-n", self.name, "addr", "add", f"{self.address}/24", "dev", LINK)
        ip("-n", self.name, "link", "set", LINK, "up")
        ip("-n", self.name, "link", "set", "lo", "up")

    @property
    def node(self) -> str:
        """Its node's id in Ray; empty when Ray takes it for dead."""
        import ray

        alive = [n for n in ray.nodes() if n["Alive"] and n["NodeManagerAddress"] == self.address]
        return str(alive[0]["NodeID"]) if alive else ""

    def join(self) -> None:
        """Start its Ray node."""
        command = [RAY, "start", f"--address={SUBNET}1:{PORT}", f"--node-ip-address={self.address}", "--num-cpus=1"]
        command += ["--resources", '{"rank": 1}', "--object-store-memory=80000000", "--block", "--disable-usage-stats"]
        with self.log.open("wb") as log:
            whole = ["ip", "netns", "exec", self.name, *command]
            self._process = subprocess.Popen(whole, stdout=log, stderr=subprocess.STDOUT)

    def cut(self) -> None:
        """Packets from and to it are lost from now on."""
        ip("link", "set", self._veth, "down")

    def kill(self) -> None:
        """All its processes end at once, as when the power goes."""
        if self._process is not None:
            for pid in {self._process.pid} | children_of({self._process.pid}):
                with_signal(pid)
            self._process.wait()
            self._process = None

    def remove(self) -> None:
        self.kill()
        ip("link", "del", self._veth, check=False)
        ip("netns", "del", self.name, check=False)


def with_signal(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


@contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """This process on the head node, and so many hosts beside it."""
    import ray

    made: list[Host] = []
    folder, logs = tempfile.mkdtemp(prefix="tpq", dir="/tmp"), tempfile.mkdtemp(prefix="tpqlogs")
    head: subprocess.Popen[bytes] | None = None
    os.environ.update(SETTINGS)
    try:
        ip("link", "add", LINK, "type", "bridge")
        ip("addr", "add", f"{SUBNET}1/24", "dev", LINK)
        ip("link", "set", LINK, "up")
        command = [RAY, "start", "--head", f"--node-ip-address={SUBNET}1", f"--port={PORT}", "--num-cpus=2"]
        command += ["--resources", '{"head": 1}']
        command += ["--include-dashboard=false", "--object-store-memory=80000000", f"--temp-dir={folder}", "--block"]
        head = subprocess.Popen(
            [*command, "--disable-usage-stats"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        made += [Host(number, logs) for number in range(count)]
        until(lambda: _listens(PORT), "the head node", 60)
        ray.init(address=f"{SUBNET}1:{PORT}", _node_ip_address=f"{SUBNET}1", log_to_driver=False)
        for number, host in enumerate(made, 1):  # one by one: of three at once, one timed out
            host.join()
            try:
                until(lambda n=number: ray.cluster_resources().get("rank", 0) == n, f"node {number}", 60)
            except AssertionError as error:
                raise AssertionError(f"{error}; it said:\n{host.log.read_text()[-1500:]}") from None
        yield made
    finally:
        ray.shutdown()
        for host in made:
            host.remove()
        if head is not None:
            for pid in {head.pid} | children_of({head.pid}):
                with_signal(pid)
            head.wait()
        ip("link", "del", LINK, check=False)
        for name in SETTINGS:
            del os.environ[name]
        for made_here in (folder, logs):
            shutil.rmtree(made_here, ignore_errors=True)


def _listens(port: int) -> bool:
    done = subprocess.run(["ss", "-Hltn", f"sport = :{port}"], capture_output=True, text=True, check=False)
    return bool(done.stdout.strip())
