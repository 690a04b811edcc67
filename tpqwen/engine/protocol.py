"""What the HTTP layer and the Python API need of an engine, wherever it runs."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from tpqwen.request import Delta, GenerateRequest
from tpqwen.step import Capacity, Snapshot, StepStats

QUEUE_DURING_REPAIR_S = 30.0  # then new requests are refused instead


@dataclass(frozen=True)
class EngineState:
    """name: loading | ready | degraded | draining | dead; reason in words, empty when ready.

    degraded: ranks or the engine process are being replaced. overdue: that takes longer than anybody wants to queue.
    """

    name: str
    reason: str = ""
    overdue: bool = False

    @property
    def accepts(self) -> bool:
        """Whether new requests are taken (a degraded engine queues them for a while)."""
        return self.name == "ready" or (self.name == "degraded" and not self.overdue)

    @property
    def error_code(self) -> str:
        """The code of a request refused in this state because something is broken."""
        return "engine_dead" if self.name == "dead" else "rank_dead"


@dataclass(frozen=True)
class Work:
    """What an engine has done so far: steps, the seconds that they took, tokens put out."""

    steps: int = 0
    seconds: float = 0.0
    tokens: int = 0

    def plus(self, stats: StepStats) -> Work:
        """With one more step."""
        return Work(self.steps + 1, self.seconds + stats.duration_s, self.tokens + stats.output_tokens)

    def since(self, earlier: Work) -> Work:
        """The difference."""
        return Work(self.steps - earlier.steps, self.seconds - earlier.seconds, self.tokens - earlier.tokens)


@dataclass
class Life:
    """What has happened to an engine so far, and the state that follows from it."""

    draining: bool = False
    dead: str | None = None  # the cause
    degraded: str = ""  # what is being replaced
    degraded_since: float | None = None  # monotonic seconds; None while nothing is

    def degrade(self, reason: str) -> None:
        """A repair goes on; the time counts from the first of several in a row."""
        self.degraded = reason
        if self.degraded_since is None:
            self.degraded_since = time.monotonic()

    @property
    def state(self) -> EngineState:
        if self.dead is not None:
            return EngineState("dead", self.dead)
        if self.draining:
            return EngineState("draining", "the server is shutting down")
        if self.degraded_since is not None:
            overdue = time.monotonic() - self.degraded_since > QUEUE_DURING_REPAIR_S
            return EngineState("degraded", self.degraded, overdue)
        return EngineState("ready")


class Engine(Protocol):
    """Asynchronous face of the engine core."""

    @property
    def capacity(self) -> Capacity:
        """Sizes of the running group."""

    @property
    def state(self) -> EngineState:
        """What /health and /ready answer from; a local value, never a call."""

    @property
    def work(self) -> Work:
        """All steps heard of so far; a local value."""

    def check_room(self) -> None:
        """Raises Overloaded (queue_full) when no request at all would be let in; a local look, before any work."""

    async def look(self, timeout_s: float) -> Snapshot | None:
        """What the scheduler holds now; None when the engine does not say so in time. Costs it nothing otherwise."""

    def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        """The request's deltas, the last one terminal. Closing the iterator aborts the request.

        Raises Overloaded before the first delta when the request is not admitted, EngineError when the engine fails.
        """
