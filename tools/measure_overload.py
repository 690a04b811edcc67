"""Twice the load that a server can bear: what its accepted requests get, what refusals cost, whether memory grows.

Run `python tools/measure_overload.py`; options after `--` go to `tpqwen serve`. It starts the embedded model's server
on the CPU, measures the peak in a closed loop, offers --factor times that in an open loop, and the peak again. Prints
one JSON line for each of the three; asserts nothing. On a busy machine only ratios mean something.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tpqwen.bench.cpu import shown_name
from tpqwen.bench.load import Case, Job, Record
from tpqwen.bench.serve import first_model, measure

PARTS = ("tpqwen replica", "tpqwen engine", "tpqwen rank", "ProxyActor", "haproxy")
READY_S = 180.0
TOKEN_IDS = 4000  # of the embedded model: no control tokens
HAPROXY_PORTS = ("STATS_PORT", "METRICS_PORT")
WATCH_S = 1.0


@contextmanager
def server(words: Sequence[str], pin: str) -> Iterator[tuple[str, int]]:
    """`tpqwen serve` on a free port: its URL and process id. pin: the CPUs that it may use, empty for all."""
    port = free_port()
    env = os.environ | {f"RAY_SERVE_HAPROXY_{name}": str(free_port()) for name in HAPROXY_PORTS}
    env |= {"RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port())}
    env.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-m", "tpqwen.cli", "serve", "--port", str(port), "--device", "cpu", "--threads", "1"]
    if pin:
        command = ["taskset", "-c", pin, *command]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([*command, *words], env=env, stdout=log, stderr=log)
        try:
            url = f"http://127.0.0.1:{port}"
            until(lambda: process.poll() is not None or is_ready(url), READY_S)
            if process.poll() is not None:
                log.seek(0)
                raise SystemExit(log.read().decode(errors="replace"))
            yield url, process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


def free_port() -> int:
    """A port of loopback that nobody has now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def is_ready(url: str) -> bool:
    """Whether it takes requests."""
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=5):
            return True
    except OSError:
        return False


def until(condition: Callable[[], bool], timeout_s: float) -> None:
    """Wait for a condition, timeout_s at most."""
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)


class Watch:
    """Memory (MiB) and CPU seconds of the server's processes, by what they call themselves, while the block runs."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._over = threading.Event()
        self.memory: list[dict[str, float]] = []
        self.pids: set[int] = set()
        self.cpu: dict[str, float] = {}

    def __enter__(self) -> Watch:
        self._before = usage(self._pid)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._over.set()
        self._thread.join()
        for pid, (part, _, cpu_s) in usage(self._pid).items():
            used = cpu_s - (self._before[pid][2] if pid in self._before else 0.0)
            self.cpu[part] = round(self.cpu.get(part, 0.0) + used, 2)

    def _watch(self) -> None:
        while not self._over.wait(WATCH_S):
            sizes: Counter[str] = Counter()
            for pid, (part, size, _) in usage(self._pid).items():
                sizes[part] += round(size)
                self.pids.add(pid)
            self.memory.append(dict(sizes))

    def memory_at(self, share: float) -> dict[str, float]:
        """At this part of the time, 0 to 1."""
        return self.memory[int(share * (len(self.memory) - 1))] if self.memory else {}


def usage(ancestor: int) -> dict[int, tuple[str, float, float]]:
    """The part, MiB and CPU seconds of each process below `ancestor` that is one of PARTS, from proc(5)."""
    parents, found = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            title = shown_name(int(folder.name))
        except OSError:
            continue
        parents[int(folder.name)] = int(fields[1])
        part = next((part for part in PARTS if part in title), None)
        if part is not None:
            cpu_s = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
            found[int(folder.name)] = (part, int(fields[21]) * os.sysconf("SC_PAGE_SIZE") / 2**20, cpu_s)
    return {pid: value for pid, value in found.items() if descends(pid, ancestor, parents)}


def descends(pid: int, ancestor: int, parents: dict[int, int]) -> bool:
    """Whether `ancestor` is above it."""
    while pid in parents and pid != ancestor:
        pid = parents[pid]
    return pid == ancestor


def load(url: str, model: str, case: Case, clients: int, seed: int) -> list[Record]:
    """The records of all clients."""
    return [r for part in measure(Job(url, model, case, 0, clients, seed, TOKEN_IDS)) for r in part.records]


def rate(records: Sequence[Record], begin_s: float, end_s: float) -> float:
    """Output tokens of complete answers that ended in this time, per second."""
    tokens = sum(r.tokens for r in records if r.error is None and begin_s <= r.at_s + r.e2e_s < end_s)
    return tokens / (end_s - begin_s)


def figures(records: Sequence[Record], seconds: float, watch: Watch, pids: int) -> dict[str, Any]:
    """One line. The first and last tenth of the time do not count for the throughput."""
    good = sorted(r.ttft_s for r in records if r.error is None)
    refused = sum(r.status == 429 for r in records)
    tokens = sum(r.tokens for r in records if r.error is None)
    others = [r.error for r in records if r.error is not None and r.status != 429]
    return {
        "requests": len(records),
        "offered_per_s": round(len(records) / seconds, 1),
        "tok_s": round(rate(records, seconds / 10, seconds * 0.9), 1),
        "statuses": dict(Counter(str(r.status) for r in records)),
        "refusals_without_retry_after": sum(r.status == 429 and not r.retry_after for r in records),
        "other_errors": others[:2],
        "ttft_p50_s": round(good[len(good) // 2], 3) if good else None,
        "ttft_p99_s": round(good[len(good) * 99 // 100], 3) if good else None,
        "tokens": tokens,
        "refused": refused,
        "cpu_s": watch.cpu,
        "mib": {share: watch.memory_at(share) for share in (0.1, 0.5, 1.0)},
        "replaced_processes": len(watch.pids) - pids,
    }


def closed(url: str, model: str, args: argparse.Namespace, requests: int, seed: int) -> tuple[list[Record], float]:
    """So many requests, args.concurrency at once; and the seconds that they took."""
    case = Case("closed", args.concurrency, requests, args.prompt, args.tokens)
    records = load(url, model, case, args.clients, seed)
    return records, max(r.at_s + r.e2e_s for r in records)


def run(url: str, pid: int, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The three lines."""
    model = first_model(url)
    records, seconds = closed(url, model, args, 4 * args.concurrency, 1)  # warms up, and says how many are enough
    enough = max(int(len(records) / seconds * args.seconds / 3), 4 * args.concurrency)
    peak = 0.0
    for seed, name in enumerate(("peak", "overload", "peak again"), 2):
        before = len(usage(pid))
        with Watch(pid) as watch:
            if name == "overload":
                per_s = args.factor * peak / args.tokens
                case = Case("open", per_s, int(per_s * args.seconds), args.prompt, args.tokens)
                records, seconds = load(url, model, case, args.clients, seed), float(args.seconds)
            else:
                records, seconds = closed(url, model, args, enough, seed)
        result = figures(records, seconds, watch, before)
        peak = peak or result["tok_s"]
        yield {"load": name, **result, "of_peak": round(result["tok_s"] / peak, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("concurrency", 64), ("prompt", 32), ("tokens", 64), ("clients", 2), ("seconds", 60)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--factor", type=float, default=2.0, help="of the peak rate (default 2)")
    parser.add_argument("--pin", default="", metavar="CPUS", help="CPUs for the server; clients then get the others")
    parser.add_argument("words", nargs="*", help="for tpqwen serve")
    args = parser.parse_args()
    with server(args.words, args.pin) as (url, pid):
        if args.pin:
            os.sched_setaffinity(0, os.sched_getaffinity(0) - {int(x) for x in args.pin.split(",")})
        for line in run(url, pid, args):
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
