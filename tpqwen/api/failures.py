"""The only table from an exception to an HTTP status and OpenAI's error body."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field

import msgspec

from tpqwen.errors import EngineError, Overloaded, RequestError
from tpqwen.request import Delta, FinishReason

_log = logging.getLogger(__name__)

_STATUS = {
    "numerical_error": 500,
    "crash_budget": 500,
    "loading": 503,
    "draining": 503,
    "queue_timeout": 503,
    "rank_dead": 503,
    "engine_dead": 503,
    "deadline_exceeded": 504,
    "client_too_slow": 499,
}
_REJECT_REASONS = {
    "queue_full": "queue_full",
    "context_length_exceeded": "too_long",
    "draining": "draining",
    "requests_per_minute": "rate_limit",
    "tokens_per_minute": "rate_limit",
    "concurrency": "rate_limit",
}
_NOT_AGAIN = ("numerical_error", "crash_budget")


class ClientLeft(Exception):
    """The connection ended before its answer did; nobody is there to be told."""


@dataclass(frozen=True)
class Failure:
    """An error as the client sees it."""

    status: int
    type: str
    message: str
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def body(self) -> bytes:
        """{"error": {...}} as JSON."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})

    @property
    def event(self) -> bytes:
        """The same as the last event of a stream."""
        return b"data: " + self.body + b"\n\n"

    @property
    def reject_reason(self) -> str:
        """Its label in the metric of rejected requests."""
        return _REJECT_REASONS.get(self.code or "", "invalid" if self.status < 500 else "unavailable")


def openai_body(failed: Failure) -> bytes:
    """The error body of all endpoints but Anthropic's."""
    return failed.body


def failure(error: BaseException, request_id: str) -> Failure:
    """What to answer to an exception. Anything that is not ours is a bug: logged with its trace, told without it."""
    if isinstance(error, Overloaded):
        headers = {"retry-after": str(max(1, math.ceil(error.retry_after_s)))}
        if not error.may_retry:
            headers["x-should-retry"] = "false"
        return Failure(error.status, error.type, str(error), error.param, error.code, headers)
    if isinstance(error, RequestError):
        headers = {"www-authenticate": "Bearer"} if error.status == 401 else {}
        return Failure(error.status, error.type, str(error), error.param, error.code, headers)
    if isinstance(error, EngineError):
        # The same request would fail in the same way, so the official client is told not to repeat it.
        headers = {"x-should-retry": "false"} if error.code in _NOT_AGAIN else {}
        if error.status >= 500:
            _log.error("request=%s code=%s error=%s", request_id, error.code, error)
        return Failure(error.status, "server_error", str(error), None, error.code, headers)
    _log.error("request=%s code=internal", request_id, exc_info=error)
    return Failure(500, "server_error", f"internal error; the request id is {request_id}", None, "internal")


def raise_if_failed(delta: Delta) -> None:
    """EngineError when the delta says that the request was not finished properly."""
    if delta.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
        code = delta.error_code or "internal"
        text = delta.error or "the engine gave the request up"
        raise EngineError(text, code=code, status=_STATUS.get(code, 500))
