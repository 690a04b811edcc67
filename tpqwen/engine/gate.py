"""Admission: who may queue for the engine. Refusing early keeps waits short, memory bounded and the refusal useful.

A request waits from its arrival to its first token. It is refused when

- max_waiting requests wait already, or its tokens are more than max_waiting_tokens beyond what the free pages hold;
- at the pace of this busy period it would wait longer than it may (queue_timeout_s), so that it would only be given up;
- its tenant, where there are tenants, would hold more of the queue than is left for others: with one tenant asking for
  all it can, half the queue stays free for whoever comes next (the threshold of Choudhury and Hahne, 1998).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from tpqwen.config import ScheduleOptions
from tpqwen.errors import Overloaded
from tpqwen.step import Capacity, StepStats

PACE_STARTS = 128  # of the last starts the pace is taken
FEWEST_STARTS = 16  # before so many nothing is said about the pace
CAUTION = 0.8  # of queue_timeout_s: the pace is an estimate, and giving up is worse than refusing
LONGEST_RETRY_S = 60.0


@dataclass(slots=True)
class Queued:
    """What waits: of everybody, or of one tenant."""

    requests: int = 0
    tokens: int = 0

    def add(self, requests: int, tokens: int) -> None:
        self.requests += requests
        self.tokens += tokens


@dataclass(slots=True, eq=False)
class Place:
    """One request's place in the queue; no longer waiting after its first token or its end."""

    tenant: str
    tokens: int
    waiting: bool = True


class Gate:
    """Counts what waits. Belongs to one event loop."""

    def __init__(
        self,
        options: ScheduleOptions,
        capacity: Capacity,
        queue_timeout_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._options = options
        self._block_size = capacity.block_size
        self._free_tokens = (capacity.num_blocks - 1) * capacity.block_size
        self._patience_s = CAUTION * queue_timeout_s
        self._clock = clock
        self._all = Queued()
        self._tenants: dict[str, Queued] = {}
        self._starts: deque[float] = deque(maxlen=PACE_STARTS)

    def observe(self, stats: StepStats) -> None:
        """After each step: how many pages are free or can be had."""
        self._free_tokens = (stats.blocks_free + stats.blocks_cached) * self._block_size

    def check_room(self) -> None:
        """Whether anybody may enter. Raises Overloaded as `enter` would for an empty prompt of nobody."""
        self._check("", Queued(), 0)

    def enter(self, tenant: str, tokens: int) -> Place:
        """A request with a prompt of so many tokens arrives. Raises Overloaded: queue_full."""
        own = self._tenants.get(tenant) or Queued()
        self._check(tenant, own, tokens)
        self._tenants.setdefault(tenant, own).add(1, tokens)
        self._all.add(1, tokens)
        return Place(tenant, tokens)

    def _check(self, tenant: str, own: Queued, tokens: int) -> None:
        wait_s = self._expected_wait_s(own)
        text = ""
        if self._is_full(tokens) or (self._patience_s and wait_s > self._patience_s):
            what = f"{self._all.requests} requests with {self._all.tokens} tokens are waiting already"
            text = f"the queue is full: {what}"
        elif tenant and own.requests and self._is_greedy(own, tokens):
            text = f"this key's share of the queue is full: {own.requests} of its requests are waiting already"
        if text:
            raise Overloaded(text, code="queue_full", retry_after_s=min(max(wait_s, 1.0), LONGEST_RETRY_S))

    def leave(self, place: Place, *, served: bool = True) -> None:
        """It waits no longer. served: it got its first token, so it counts for the pace. Idempotent."""
        if not place.waiting:
            return
        place.waiting = False
        own = self._tenants[place.tenant]
        for queued in (own, self._all):
            queued.add(-1, -place.tokens)
        if not own.requests:
            del self._tenants[place.tenant]
        if not self._all.requests:
            self._starts.clear()  # whoever comes next finds nobody: a new busy period
        elif served:
            self._starts.append(self._clock())

    def _is_full(self, tokens: int) -> bool:
        if self._all.requests >= self._options.max_waiting:
            return True
        return bool(self._all.tokens) and self._all.tokens + tokens > self._most_tokens

    def _is_greedy(self, own: Queued, tokens: int) -> bool:
        left = self._options.max_waiting - self._all.requests
        return own.requests >= left or own.tokens + tokens > max(self._most_tokens - self._all.tokens, 0)

    @property
    def _most_tokens(self) -> int:
        """Waiting tokens at most. What has pages at hand is about to run, so it does not count as queueing."""
        return self._options.max_waiting_tokens + self._free_tokens

    def _expected_wait_s(self, own: Queued) -> float:
        """At the present pace, if tenants take turns; 0 while the pace is not known."""
        if len(self._starts) < FEWEST_STARTS:
            return 0.0
        ahead = min(self._all.requests, (own.requests + 1) * max(len(self._tenants), 1))
        return ahead * (self._clock() - self._starts[0]) / len(self._starts)
