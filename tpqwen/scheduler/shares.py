"""Fair shares of the queue: start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996) over tokens.

Each tenant has a clock that runs on by the cost of each of its requests; a request's tag is where that clock stood, at
least the tag of whoever entered last. Lower tags go first, so tenants with requests waiting are served in turn, by
tokens, and one that was idle has saved nothing up. A lone tenant's tags grow with arrival: first come, first served.
"""

from __future__ import annotations

from dataclasses import dataclass

from tpqwen.request import GenerateRequest

ASSUMED_OUTPUT = 256  # tokens of an answer before its length is known; put right when it has ended
MANY_TENANTS = 4096


@dataclass(slots=True)
class Clock:
    """last: tag of the tenant's latest request; next: that of the one to come."""

    last: int
    next: int


class Shares:
    """Integers only: the same requests in the same order always get the same tags."""

    def __init__(self) -> None:
        self._clocks: dict[str, Clock] = {}
        self._now = 0  # tag of the latest entry

    def tag(self, request: GenerateRequest) -> int:
        """The tag of a new request."""
        tenant = request.tenant
        clock = self._clocks.get(tenant)
        start = self._now if clock is None else max(self._now, clock.next)
        if clock is None and len(self._clocks) >= MANY_TENANTS:
            self._clocks = {name: c for name, c in self._clocks.items() if c.next > self._now}
        self._clocks[tenant] = Clock(start, start + _expected_tokens(request))
        return start

    def entered(self, tag: int) -> None:
        """A request with this tag is being served."""
        self._now = max(self._now, tag)

    def ended(self, request: GenerateRequest, tokens: int) -> None:
        """A request has taken so many tokens in all: that is charged instead. Requests that wait keep their tags."""
        if clock := self._clocks.get(request.tenant):
            clock.next = max(clock.next + tokens - _expected_tokens(request), clock.last)


def _expected_tokens(request: GenerateRequest) -> int:
    """What it will take, before the length of its answer is known."""
    return len(request.prompt_ids) + len(request.output_ids) + min(request.max_tokens, ASSUMED_OUTPUT)
