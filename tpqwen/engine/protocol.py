"""What the HTTP layer and the Python API need of an engine, wherever it runs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from tpqwen.request import Delta, GenerateRequest
from tpqwen.step import Capacity


@dataclass(frozen=True)
class EngineState:
    """name: loading | ready | degraded | draining | dead; reason in words, empty when ready."""

    name: str
    reason: str = ""

    @property
    def accepts(self) -> bool:
        """Whether new requests are taken (a degraded engine queues them)."""
        return self.name in ("ready", "degraded")


class Engine(Protocol):
    """Asynchronous face of the engine core."""

    @property
    def capacity(self) -> Capacity:
        """Sizes of the running group."""

    @property
    def state(self) -> EngineState:
        """What /health and /ready answer from; a local value, never a call."""

    def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        """The request's deltas, the last one terminal. Closing the iterator aborts the request.

        Raises Overloaded before the first delta when the request is not admitted, EngineError when the engine fails.
        """
