"""How requests are counted and logged: a line for each, but one a second where many are refused for the same reason.

Writing a line costs more than the refusal itself, and a flood of refusals is when there is least to spare.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from tpqwen.api.exchange import Exchange
from tpqwen.api.hooks import RequestHooks

EVERY_S = 1.0
_REFUSED = 429
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Flood:
    """Refusals of one kind: when the next may have a line, and how many have had none since the last."""

    due: float = 0.0
    unsaid: int = 0


class Journal:
    """What is known of an ended request goes to the metrics and into the log. Belongs to the event loop.

    Of refusals (429) with the same code and key the first within EVERY_S has a line; `refused` in it counts itself and
    those before it that had none. The metrics count all of them.
    """

    def __init__(self, hooks: RequestHooks, clock: Callable[[], float] = time.monotonic) -> None:
        self._hooks = hooks
        self._clock = clock
        self._floods: dict[tuple[str | None, str | None], _Flood] = {}  # as many as there are keys and codes at most

    def note(self, exchange: Exchange, route: str, status: int) -> None:
        """The request has ended. route: a path of ours or "other"; status: as metrics count it."""
        now = self._clock()
        method = exchange.method if exchange.method in _METHODS else "other"
        self._hooks.on_http(route, method, status, now - exchange.arrived)
        level = logging.INFO if route.startswith("/v1/") or status >= 400 else logging.DEBUG
        if _log.isEnabledFor(level) and (status != _REFUSED or self._is_due(exchange, now)):
            numbers = "".join(f" {k}={v}" for k, v in exchange.numbers.items())
            text = "request=%s route=%s method=%s status=%d code=%s ms=%.1f%s"
            ms = (now - exchange.arrived) * 1e3
            words = exchange.request_id, route, method, status, exchange.code, ms, numbers
            # Made here, since _log.log looks through the stack for its caller, and Ray has added to what makes records.
            _log.handle(logging.LogRecord(_log.name, level, __file__, 0, text, words, None))

    def _is_due(self, exchange: Exchange, now: float) -> bool:
        """Whether this refusal gets a line; then it is told for how many."""
        kind = exchange.code, exchange.key.id if exchange.key else None
        flood = self._floods.setdefault(kind, _Flood())
        flood.unsaid += 1
        if now < flood.due:
            return False
        exchange.numbers["refused"] = flood.unsaid
        flood.due, flood.unsaid = now + EVERY_S, 0
        return True
