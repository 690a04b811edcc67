"""One training or test conversation, the split into seen and unseen, and the register of skills."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

HELD_OUT_SHARE = 16  # one key in so many never appears in training
T = TypeVar("T")


@dataclass
class Example:
    """What is asked, what should be thought and answered. key names the instance for the held-out split."""

    messages: list[dict[str, Any]]
    reasoning: str
    answer: str
    key: str
    tools: list[dict[str, Any]] | None = None
    exact: bool = True  # the answer is the only right one
    spelt: bool = False  # the answer is written in single characters, however the tokenizer would join them
    alone: bool = False  # neither a system prompt nor earlier turns may be put before it

    @property
    def held_out(self) -> bool:
        """Whether this instance belongs to the evaluation only."""
        return zlib.crc32(self.key.encode()) % HELD_OUT_SHARE == 0


@dataclass
class Source:
    """What generators draw from: randomness, words to spell and paragraphs to quote."""

    rng: random.Random
    words: list[str] = field(default_factory=list)
    paragraphs: list[str] = field(default_factory=list)

    def pick(self, choices: Sequence[T]) -> T:
        """One of choices."""
        return choices[int(self.rng.random() * len(choices))]

    def some(self, choices: Sequence[T], low: int, high: int) -> list[T]:
        """Between low and high different ones of choices."""
        return self.rng.sample(choices, min(self.rng.randint(low, high), len(choices)))

    def number(self, low: int, high: int) -> int:
        """An integer, both ends included."""
        return self.rng.randint(low, high)


@dataclass(frozen=True)
class Skill:
    """A generator and its share in the data. checked: exact match is reported for it."""

    name: str
    weight: float
    make: Callable[[Source], Example]
    checked: bool = True


def ask(question: str, answer: str, reasoning: str, key: str | None = None, **more: Any) -> Example:
    """A conversation of one question."""
    return Example([{"role": "user", "content": question}], reasoning, answer, key or question, **more)
