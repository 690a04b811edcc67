"""Talks ASGI to an app: whole exchanges through httpx, streams and disconnects by hand."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

import httpx

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
HELLO = [{"role": "user", "content": "hi"}]


def exchange(app: Any, method: str, path: str, **options: Any) -> httpx.Response:
    """One request to its end."""

    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **options)

    return asyncio.run(asyncio.wait_for(run(), 20))


def post(app: Any, path: str, **body: Any) -> httpx.Response:
    """A JSON body posted."""
    return exchange(app, "POST", path, json=body)


@dataclass
class Connection:
    """One HTTP connection of a client that reads as it likes and may leave at any time."""

    app: Any
    path: str
    body: dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict)
    status: int | None = None
    sent: list[bytes] = field(default_factory=list)
    complete: bool = False
    stuck: bool = False  # the client takes nothing more
    method: str = "POST"
    body_read: bool = False

    def __post_init__(self) -> None:
        self._gone = asyncio.Event()
        self._changed = asyncio.Event()

    async def run(self) -> None:
        """The exchange; ends when the app returns."""
        raw = json.dumps(self.body).encode() if self.method == "POST" else b""
        headers = {"content-type": "application/json", "content-length": str(len(raw)), **self.headers}
        scope = {
            "type": "http",
            "method": self.method,
            "path": self.path,
            "query_string": b"",
            "headers": [(k.encode(), v.encode()) for k, v in headers.items()],
        }
        await self.app(scope, lambda: self._receive(raw), self._take)

    def leave(self) -> None:
        """The client closes the connection."""
        self._gone.set()

    async def until(self, text: str) -> None:
        """Wait until the text has been sent."""
        while text.encode() not in b"".join(self.sent):
            await self.changed()

    async def changed(self) -> None:
        """Wait until more has been sent."""
        self._changed.clear()
        await asyncio.wait_for(self._changed.wait(), 10)

    @property
    def events(self) -> list[Any]:
        """JSON of each data event; the string "[DONE]" stands for the end mark."""
        return events("".join(part.decode() for part in self.sent))

    async def _receive(self, raw: bytes) -> dict[str, Any]:
        if not self.body_read:
            self.body_read = True
            return {"type": "http.request", "body": raw, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _take(self, message: dict[str, Any]) -> None:
        if self.stuck:
            await asyncio.Event().wait()
        if message["type"] == "http.response.start":
            self.status = message["status"]
        else:
            self.sent.append(message.get("body", b""))
            self.complete = not message.get("more_body", False)
        self._changed.set()


def events(text: str) -> list[Any]:
    """Data events of an SSE body."""
    lines = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def stream(app: Any, path: str, **body: Any) -> list[Any]:
    """All events of a streamed answer."""
    answer = post(app, path, stream=True, **body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    return events(answer.text)
