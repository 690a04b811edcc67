"""What the engine core needs of the ranks; Ray, local and fake executors are interchangeable."""

from __future__ import annotations

from typing import Protocol

from tpqwen.errors import RankDied
from tpqwen.step import Capacity, RankStats, StepInput, StepOutput


class Executor(Protocol):
    """A group of ranks that run steps in the order submitted.

    submit returns at once; collect returns the oldest step not yet collected. At most `depth` steps are in flight.
    """

    depth: int

    def start(self) -> Capacity:
        """Load weights and size the cache. Raises ConfigError or EngineError; leaves nothing behind if it does."""

    def submit(self, step: StepInput) -> None:
        """Queue one step on every rank. Raises RankDied."""

    def collect(self, timeout_s: float) -> StepOutput:
        """The oldest step's output. Raises RankDied when a rank is dead, reports an error of its own or the deadline
        passes."""

    def ready(self) -> bool:
        """Whether collect would return at once."""

    def repair(self, error: RankDied) -> Capacity:
        """Replace the ranks that this error is about; the next step is the first of a new epoch.

        Raises the error where ranks cannot be replaced from here, EngineError or ConfigError when it does not succeed.
        """

    def stats(self) -> list[RankStats]:
        """Slow numbers of every rank that answers in time; never blocks a step."""

    def stop(self) -> None:
        """End every rank and free what start took. Idempotent."""
