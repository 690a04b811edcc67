"""Clients of a server that ends: what they are told, over new and over kept connections."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import httpx

from tests.cluster.background import Background
from tests.cluster.processes import until

REQUEST = {"prompt": "one two three", "max_tokens": 1500, "temperature": 0, "ignore_eos": True, "stream": True}


def status(url: str) -> tuple[int, str]:
    try:
        answer = httpx.get(f"{url}/ready", timeout=5)
    except httpx.HTTPError:
        return 0, ""
    return answer.status_code, answer.json()["status"] if answer.status_code in (200, 503) else ""


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [probe.getsockname()[1] for probe in probes]


@contextmanager
def streams(url: str, count: int, max_tokens: int) -> Iterator[list[Future[list[Any]]]]:
    """So many streams, each of which has begun; what gives the events of each."""
    body = REQUEST | {"max_tokens": max_tokens}
    begun: list[int] = []

    def read(index: int) -> list[Any]:
        events: list[Any] = []
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as answer:
            assert answer.status_code == 200
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    events.append(line[6:] if line == "data: [DONE]" else json.loads(line[6:]))
                    begun.append(index)
        return events

    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(read, index) for index in range(count)]
        until(lambda: len(set(begun)) == count, "every stream's first token", 60)
        yield futures


def tokens_in(url: str, seconds: float) -> int:
    """How long a stream must be to take so long at the present speed, as far as the context allows that."""
    began, sample = time.monotonic(), 40
    with streams(url, 1, sample) as (stream,):
        stream.result()
    return min(1900, int(seconds * sample / (time.monotonic() - began)))


class Clients(Background):
    """Two that ask again and again, one over a new connection each time, one over a kept one; what they were told."""

    def __init__(self, url: str) -> None:
        super().__init__(partial(self._ask, kept=False), partial(self._ask, kept=True))
        self._url = url
        self.told: dict[bool, list[tuple[int, str]]] = {False: [], True: []}

    def _ask(self, kept: bool) -> None:
        """0: nobody is there, or not any more."""
        client = httpx.Client(timeout=30)
        body = REQUEST | {"max_tokens": 1, "stream": False}
        while not self.over.is_set():
            try:
                answer = client.post(f"{self._url}/v1/completions", json=body)
                ours = answer.status_code == 503 and "json" in answer.headers.get("content-type", "")
                code = answer.json()["error"]["code"] if ours else ""
                said = answer.status_code, code + (" again later" if "retry-after" in answer.headers else "")
            except httpx.HTTPError:
                said = 0, ""
            if self.told[kept][-1:] != [said]:
                self.told[kept].append(said)
            if not kept:
                client.close()
                client = httpx.Client(timeout=30)
            time.sleep(0.02)
        client.close()
