"""One HTTP exchange: what came, what has been sent, and how its end is recorded."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
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
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        self.header_bytes = sum([len(name) + len(value) for name, value in headers])
        self.headers: Mapping[str, str] = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in headers}
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
        self._task: asyncio.Task[Any] | None = None  # that runs the answer, until it is given up
        self._send = send
        self._send_request_id = send_request_id

    async def receive(self) -> Message:
        """The ASGI receive of this exchange. Raises RequestError 408 when the body does not come to its end in time."""
        if not self._body_timeout_s:
            return await self._receive()
        left = self.arrived + self._body_timeout_s - time.monotonic()
        try:
            async with asyncio.timeout(max(left, 0.0)):
                message = await self._receive()
        except TimeoutError:
            text = f"the body was not here after {self._body_timeout_s:g} s"
            raise RequestError(text, code="body_timeout", status=408) from None
        if not message.get("more_body", False):
            self._body_timeout_s = 0.0  # it is here
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

    async def until_client_leaves(self, work: Coroutine[Any, Any, None]) -> bool:
        """Run `work`, after the body was read, but cancel it when the client leaves: then False. Raises what it raises.

        It runs in the caller's task: one task less for each request.
        """
        task = self._task = asyncio.current_task()
        assert task is not None
        cancelled_before = task.cancelling()
        watch = asyncio.create_task(self._watch())
        try:
            await work
        except asyncio.CancelledError:
            if self._task is task or task.uncancel() > cancelled_before:  # by somebody else
                raise
            return False
        finally:
            self._task = None
            watch.cancel()
        return True

    def give_up(self) -> None:
        """Nobody reads any more: what runs within until_client_leaves is cancelled, unless the answer is complete."""
        if self._task is not None and not self.complete:
            self._task.cancel()
            self._task = None

    async def _watch(self) -> None:
        with suppress(Exception):  # a proxy that is gone has taken its client along
            while (await self._receive())["type"] != "http.disconnect":
                pass
        self.give_up()  # servers report a disconnect after every complete answer too


def _path(scope: Scope) -> str:
    """The path below the place where the app is mounted."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "").rstrip("/")
    return path[len(root) :] if root and path.startswith(root + "/") else path
