"""A step while it is put together, and while its result is still to come."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from tpqwen.scheduler.rows import RowSet
from tpqwen.scheduler.sequence import Sequence
from tpqwen.step import Admit, Chunk


class Part(NamedTuple):
    """A chunk in flight: it counts while its slot is still of that generation."""

    sequence: Sequence
    slot: int
    generation: int
    end: int  # position after its last token


@dataclass(slots=True)
class Draft:
    """A step being put together."""

    admits: list[Admit] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)  # (slot, index, block) flat
    chunks: list[Chunk] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    sampled: list[Sequence] = field(default_factory=list)


@dataclass(slots=True)
class Flight:
    """A step whose result is still to come. rows: the first num_decode decode, the others are sampling chunks.

    releases: Rows.releases when it was scheduled; all its rows are live while none came since.
    """

    step: int
    rows: RowSet
    releases: int
    num_decode: int
    parts: list[Part]
    num_chunk_tokens: int


@dataclass(slots=True)
class Tally:
    """Events since the last StepStats."""

    preemptions: int = 0
    prefix_queried: int = 0
    prefix_hit: int = 0
    output_tokens: int = 0
