"""`tpqwen serve` that cannot start: one sentence, an exit code, and nothing left behind."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.processes import pids, until

pytestmark = pytest.mark.ray

MARK = "TPQWEN_TEST_FAILED_START"
OPTIONS = ["--device", "cpu", "--dtype", "float32", "--threads", "1"]
MUCH_MEMORY = """
import os
real = os.sysconf
os.sysconf = lambda name: 1 << 48 if name == "SC_PHYS_PAGES" else real(name)
"""


def descendants(mark: str) -> list[int]:
    """Processes that have inherited our mark, whoever their parent is by now."""
    found = []
    for pid in pids():
        try:
            if f"{MARK}={mark}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes():
                found.append(pid)
        except OSError:
            continue
    return found


def refused(tmp_path: Path, *words: str) -> str:
    """Run the command with tmp_path on the path; the sentence with which it ends."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    mark = str(tmp_path)
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {MARK: mark}
    environment["PYTHONPATH"] = os.pathsep.join([mark, *filter(None, [os.environ.get("PYTHONPATH")])])
    run = [sys.executable, "-c", "from tpqwen.cli import main; raise SystemExit(main())", "serve", "--port", str(port)]
    done = subprocess.run([*run, *OPTIONS, *words], env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 2, done.stderr
    sentences = [line for line in done.stderr.splitlines() if line.startswith("tpqwen: ")]
    assert len(sentences) == 1 and sentences[0] == done.stderr.splitlines()[-1], done.stderr
    assert "Traceback" not in done.stderr
    until(lambda: not descendants(mark), "the end of every process")
    with socket.create_server(("127.0.0.1", port)):
        pass  # nobody listens there
    assert not [name for name in os.listdir("/dev/shm") if name.startswith("tpqwen")]
    return sentences[0]


def test_a_damaged_shard_ends_the_start_by_its_name(checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    with (folder / "SHA256SUMS").open("wb") as sums:
        subprocess.run(["sha256sum", "model.safetensors"], cwd=folder, stdout=sums, check=True)
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert "model.safetensors is damaged or not the file that was meant" in refused(tmp_path, str(folder))


def test_a_cache_larger_than_the_machine_ends_the_start_before_any_process(tmp_path: Path) -> None:
    assert "and this machine has" in refused(tmp_path, "--num-kv-blocks", str(10**12))


@pytest.mark.timeout(200)
def test_an_allocation_that_fails_in_a_rank_ends_the_start(tmp_path: Path) -> None:
    """The machine is said to have more memory than it has, so that it is the rank that does not get it."""
    (tmp_path / "sitecustomize.py").write_text(MUCH_MEMORY)
    assert "this machine has" in refused(tmp_path, "--tp", "2", "--num-kv-blocks", str(10**12))
