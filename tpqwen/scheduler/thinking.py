"""Watches one sequence's reasoning against its budget, by token id."""

from __future__ import annotations

from collections.abc import Iterable

from tpqwen.request import ThinkingBudget


class ThinkingWatch:
    """A function of the output tokens alone, so that a resubmitted sequence is watched from where it was.

    The block opens in the prompt, or with the first output token; no later one opens it.
    """

    def __init__(self, budget: ThinkingBudget, output: Iterable[int] = ()) -> None:
        self.closing = budget.closing
        self._budget = budget
        self._first = True
        self._inside = budget.inside
        self._count = 0
        for token in output:
            self.take(token)

    def take(self, token: int) -> None:
        """One more output token."""
        if self._first and not self._inside:
            self._inside = token == self._budget.open_id
        elif self._inside and token == self._budget.close_id:
            self._inside = False
        elif self._inside:
            self._count += 1
        self._first = False

    @property
    def due(self) -> bool:
        """Whether the closing sentence must follow now."""
        return self._inside and self._count >= self._budget.tokens
