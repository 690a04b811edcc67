"""One HTTP exchange: what came, what has been sent, and how its end is recorded."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from starlette.types import Message, Receive, Scope, Send

from tpqwen.api.failures import Failure, openai_body
from tpqwen.api.keys import ApiKey
from tpqwen.api.limits import Lease
from tpqwen.errors import RequestError

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
JSON = "application/json"


class Exchange:
    """request_id is the client's x-request-id where that is 1..128 of A-Za-z0-9._-, else a new one.

    status is what was sent, None before that; counted_status is what metrics count where that differs (a stream that
    ended in an error, a client that left). arrived is monotonic time. body_timeout_s: until the whole body is here.
    """

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, send_request_id: bool, body_timeout_s: float = 0.0
    ) -> None:
        self.arrived = time.monotonic()
        self.method: str = scope["method"]
        self.path = _path(scope)
        self.query: str = scope.get("query_string", b"").decode("latin-1")
        self.header_bytes = sum(len(name) + len(value) for name, value in scope["headers"])
        self.headers: Mapping[str, str] = {
            k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]
        }
        given = self.headers.get("x-request-id", "")
        self.request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        self.status: int | None = None
        self.complete = False  # the last byte has been sent
        self.counted_status: int | None = None
        self.code: str | None = None  # of an error, for the log
        self.error_body: Callable[[Failure], bytes] = openai_body  # in the shape that the endpoint's clients know
        self.numbers: dict[str, Any] = {}  # for the log: whose key, token counts, finish reasons
        self.key: ApiKey | None = None  # whose request it is, where keys are in force
        self.lease: Lease | None = None  # what it counts as
        self._receive = receive
        self._body_timeout_s = body_timeout_s
        self._has_body = False
        self._send = send
        self._send_request_id = send_request_id

    async def receive(self) -> Message:
        """The ASGI receive of this exchange. Raises RequestError 408 when the body does not come to its end in time."""
        if self._has_body or not self._body_timeout_s:
            return await self._receive()
        left = self.arrived + self._body_timeout_s - time.monotonic()
        try:
            async with asyncio.timeout(max(left, 0.0)):
                message = await self._receive()
        except TimeoutError:
            text = f"the body was not here after {self._body_timeout_s:g} s"
            raise RequestError(text, code="body_timeout", status=408) from None
        self._has_body = not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        """The ASGI send of this exchange."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            own = [(b"x-request-id", self.request_id.encode())] if self._send_request_id else []
            if self.lease is not None:
                own += self.lease.headers()
            if own:
                message["headers"] = [*message.get("headers", ()), *own]
        await self._send(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self.complete = True

    async def reply(self, body: bytes, status: int = 200, kind: str = JSON, **headers: str) -> None:
        """Send a whole answer. Header names are written with _ for -."""
        raw = [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()]
        raw += [(b"content-type", kind.encode()), (b"content-length", str(len(body)).encode())]
        await self.send({"type": "http.response.start", "status": status, "headers": raw})
        await self.send({"type": "http.response.body", "body": body})

    async def reply_json(self, value: Any, status: int = 200, **headers: str) -> None:
        await self.reply(msgspec.json.encode(value), status, **headers)

    async def fail(self, failed: Failure) -> None:
        """Send an error, unless an answer has begun (then its connection must break, not end)."""
        self.code = failed.code
        if self.status is None:
            headers = {k.replace("-", "_"): v for k, v in failed.headers.items()}
            if failed.status in (408, 413):
                headers["connection"] = "close"  # the rest of the body is not read
            await self.reply(self.error_body(failed), failed.status, **headers)

    async def client_left(self) -> None:
        """Returns when the client's connection has ended; to be awaited after the body was read."""
        while (await self.receive())["type"] != "http.disconnect":
            pass

    async def until_client_leaves(self, work: asyncio.Task[None]) -> bool:
        """Await `work`, but cancel it when the client leaves. False if it was cancelled. Raises what work raises."""
        leaving = asyncio.create_task(self.client_left())
        try:
            await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if self.complete:  # servers report a disconnect after every complete answer
                await asyncio.wait({work})
        finally:
            for task in (work, leaving):
                task.cancel()
            await asyncio.gather(work, leaving, return_exceptions=True)
        if work.cancelled():
            return False
        work.result()
        return True


def _path(scope: Scope) -> str:
    """The path below the place where the app is mounted."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "").rstrip("/")
    return path[len(root) :] if root and path.startswith(root + "/") else path
