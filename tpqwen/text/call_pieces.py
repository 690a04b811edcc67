"""What a parser of tool calls tells while a call streams in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class CallPiece:
    """The name, once, with the first piece; and the next part of the arguments as JSON text."""

    name: str | None
    arguments: str


class CallParser(Protocol):
    """Reads the text between the marks of one call, in any pieces. `committed`: it has told the name."""

    committed: bool

    def feed(self, text: str) -> CallPiece | None:
        """Take more text."""

    def close(self) -> CallPiece | None:
        """The call is over; one that is not committed after this is no call."""
