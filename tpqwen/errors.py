"""Every exception of tpqwen, in one tree.

TpqwenError
+-- ConfigError      what was asked for cannot work: bad option, bad checkpoint, TP degree that does not divide
+-- RequestError     one request is refused or ended; carries what the HTTP answer needs
|   +-- Overloaded   refused now, worth trying again (429, or 503 while draining or loading)
+-- EngineError      the engine failed under a valid request (500, 503)
    +-- RankDied     a rank of the group is gone, hung or unreachable
"""

from __future__ import annotations


class TpqwenError(Exception):
    """Base of every error that tpqwen raises on purpose."""


class ConfigError(TpqwenError):
    """The start is refused; the message says what would work."""


class RequestError(TpqwenError):
    """One request is invalid. `param` names the field, `code` is OpenAI's machine-readable word."""

    status = 400
    type = "invalid_request_error"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        status: int | None = None,
        type: str | None = None,
    ) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = self.status if status is None else status
        self.type = self.type if type is None else type


class Overloaded(RequestError):
    """Refused for now. `retry_after_s` becomes the Retry-After header.

    may_retry False: the same request would be refused for ever, so that clients are told not to repeat it.
    """

    status = 429
    type = "rate_limit_exceeded"

    def __init__(
        self, message: str, *, code: str, retry_after_s: float = 1.0, status: int = 429, may_retry: bool = True
    ) -> None:
        kind = "rate_limit_exceeded" if status == 429 else "server_error"
        super().__init__(message, code=code, status=status, type=kind)
        self.retry_after_s = retry_after_s
        self.may_retry = may_retry


class EngineError(TpqwenError):
    """The engine could not finish a valid request. `code` as in the error table of docs/api.md."""

    def __init__(self, message: str, *, code: str = "internal", status: int = 500) -> None:
        super().__init__(message)
        self.code = code
        self.status = status


class RankDied(EngineError):
    """Rank `rank` of the group is dead, hung or cut off."""

    def __init__(self, message: str, *, rank: int | None = None) -> None:
        super().__init__(message, code="rank_dead", status=503)
        self.rank = rank
