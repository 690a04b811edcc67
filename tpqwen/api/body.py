"""Reads a JSON request body within limits, more strictly than json.loads."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar

from starlette.types import Receive

from tpqwen.api.failures import ClientLeft
from tpqwen.errors import RequestError

MAX_DEPTH = 64
T = TypeVar("T")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class LongBodies:
    """Bodies above so many bytes are read in a thread, one at a time: each step of parsing holds the interpreter for
    milliseconds, and twenty threads would hold it in turn for twenty times as long."""

    def __init__(self, above_bytes: int) -> None:
        self.above_bytes = above_bytes
        self.one_at_a_time = asyncio.Lock()


async def read_json(
    headers: Mapping[str, str],
    receive: Receive,
    max_bytes: int,
    *,
    read: Callable[[dict[str, Any]], T],
    long: LongBodies,
) -> T:
    """What `read` makes of the body, an object. Raises RequestError (400, 413, 415), ClientLeft, or what read raises.

    A body whose Content-Length is over the limit is refused unread.
    """
    _check_type(headers)
    length = headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > max_bytes:
        raise _too_large(max_bytes)
    body = await _read(receive, max_bytes)
    if len(body) <= long.above_bytes:
        return read(parse(body))
    async with long.one_at_a_time:
        return await asyncio.to_thread(lambda: read(parse(body, _integer)))


def parse(body: bytes, integer: Callable[[str], int] | None = None) -> dict[str, Any]:
    """A JSON object: UTF-8, no duplicate keys, no NaN or Infinity, no lone surrogates, at most MAX_DEPTH deep.

    integer: reads the integers; without it they are read ten times as fast, and no thread gets its turn meanwhile.
    """
    try:
        text = body.decode("utf-8")
        value = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite, parse_int=integer
        )  # digits beyond Python's limit are a ValueError
    except (ValueError, RecursionError) as error:
        what = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
        raise _invalid(f"the body is not valid JSON ({what})") from None
    if not isinstance(value, dict):
        raise _invalid("the body must be a JSON object")
    if body.count(b"[") + body.count(b"{") > MAX_DEPTH and _deeper_than(value, MAX_DEPTH):
        raise _invalid(f"the body is nested deeper than {MAX_DEPTH} levels")
    if b"\\u" in body and _SURROGATE.search(body):
        _check_encodable(value)
    return value


def _check_type(headers: Mapping[str, str]) -> None:
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        message = "the body must be JSON, with the header Content-Type: application/json"
        raise RequestError(message, code="unsupported_media_type", status=415)
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise RequestError("compressed bodies are not read", code="unsupported_media_type", status=415)


async def _read(receive: Receive, max_bytes: int) -> bytes:
    body = bytearray()  # however small the chunks are, it is as large as they are together
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        body += message.get("body", b"")
        if len(body) > max_bytes:
            raise _too_large(max_bytes)
        if not message.get("more_body", False):
            return bytes(body)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))[:64]  # type: ignore[func-returns-value]
        _check_encodable(twice)
        raise RequestError(f"the key {twice!r} is given twice", param=twice, code="duplicate_field")
    return value


def _no_constant(name: str) -> NoReturn:
    raise _invalid(f"{name} is not JSON")


def _integer(text: str) -> int:
    """A Python function, so that other threads get their turn between the numbers of a long list."""
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise _invalid("a number is too large")
    return value


def _check_encodable(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        message = "a string holds half of a surrogate pair (\\ud800..\\udfff)"
        raise RequestError(message, code="invalid_encoding") from None


def _deeper_than(value: Any, levels: int) -> bool:
    """Whether containers are nested more than `levels` deep; level by level, so that no depth can exhaust the stack."""
    layer = [value]
    for _ in range(levels):
        layer = [
            child
            for container in layer
            for child in (container.values() if isinstance(container, dict) else container)
            if isinstance(child, dict | list)
        ]
        if not layer:
            return False
    return True


def _invalid(message: str) -> RequestError:
    return RequestError(message, code="invalid_json")


def _too_large(max_bytes: int) -> RequestError:
    return RequestError(f"the body is larger than {max_bytes} bytes", code="request_too_large", status=413)
