"""What `tpqwen serve` shows while a server starts and when it is ready."""

from __future__ import annotations

import json
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from tpqwen.exposure import LOOPBACK

STAGES = {"weights": "weights", "kv_alloc": "KV cache", "warmup": "warm-up", "kernels": "kernels"}
LOADED = re.compile(r'process="rank 0/\d+" .* stage=(\w+) seconds=([\d.]+)')
TROUBLE = re.compile(r" level=(warning|error|critical) process=")


class Watch:
    """One line for each stage that is over, with the seconds since the start; on a terminal a running clock below.

    The stages come from rank 0's log, which Ray forwards to `forward` on a thread of its own. verbose: every forwarded
    line is shown, otherwise only warnings and errors of tpqwen.
    """

    def __init__(self, console: Console, *, verbose: bool) -> None:
        self._console = console
        self._verbose = verbose
        self._started = time.monotonic()
        self._ready = False

    def say(self, text: str) -> None:
        """A line with the time since the start."""
        self._console.print(f"{self._seconds():6.1f} s  {text}")

    def tick(self) -> None:
        """Show that time passes, where somebody looks on."""
        if self._console.is_terminal:
            print(f"\r{self._seconds():6.1f} s", end="\r", file=sys.stderr, flush=True)

    def forward(self, batch: Mapping[str, Any]) -> None:
        """Lines that one of the processes logged."""
        for line in batch["lines"]:
            found = LOADED.search(line)
            if self._verbose or TROUBLE.search(line):
                self._console.print(line)
            elif found and not self._ready:
                self.say(f"{STAGES.get(found[1], found[1])} done ({float(found[2]):.1f} s)")

    def done(self, load_seconds: Mapping[str, float]) -> None:
        """The last line: seconds in all and of each stage."""
        self._ready = True
        parts = ", ".join(f"{STAGES.get(stage, stage)} {s:.1f}" for stage, s in load_seconds.items())
        self._console.print(f"ready in {self._seconds():.1f} s" + (f" ({parts})" if parts else ""))

    def _seconds(self) -> float:
        return time.monotonic() - self._started


def server_url(host: str, port: int) -> str:
    """Where this host itself reaches the server."""
    return f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"


def is_ready(url: str) -> bool:
    """Whether the server at `url` takes new requests."""
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except urllib.error.HTTPError as error:
        error.close()
        return False
    except OSError:
        return False


def banner(facts: Mapping[str, Any], host: str, port: int, others: Mapping[int, str] | None = None) -> str:
    """What runs, where it answers, and a request to paste.

    facts: what the deployment's `describe` says. others: ports that are open besides, and what for.
    """
    url = server_url(host, port)
    rows = {
        "model": facts["model"],
        "ranks": f"{facts['tp']} on {facts['device']}",
        "context": f"{facts['max_model_len']} tokens",
        "KV cache": f"{facts['kv_tokens']} tokens",
        "API": f"{url}/v1",
        "health": f"{url}/health, {url}/ready",
        "metrics": f"{url}/metrics",
    }
    if others:
        rows["also open"] = ", ".join(f"{number} ({use})" for number, use in others.items())
    message = {"role": "user", "content": "Hello!"}
    body = json.dumps({"model": facts["model"], "messages": [message], "stream": True})
    lines = ["", *(f"  {key:<10}{value}" for key, value in rows.items()), ""]
    closed = facts.get("closed", False)
    if host not in LOOPBACK and not closed:
        lines += [f"  Anyone who reaches {host}:{port} can use this server.", ""]
    lines += [
        f"  curl -N {url}/v1/chat/completions \\",
        *(["    -H 'authorization: Bearer KEY' \\"] if closed else []),
        "    -H 'content-type: application/json' \\",
        f"    -d '{body}'",
    ]
    return "\n".join([*lines, ""])
