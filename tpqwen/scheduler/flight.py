"""A step while it is put together, and while its result is still to come."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from tpqwen.cache.blocks import BlockPool
from tpqwen.scheduler.rows import RowSet
from tpqwen.scheduler.sequence import Sequence
from tpqwen.step import Admit, Chunk, StepStats


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
    speculate: int = 0  # tokens drafted for each row

    @property
    def num_tokens(self) -> int:
        """That it computes."""
        return self.num_decode * (1 + self.speculate) + self.num_chunk_tokens


@dataclass(slots=True)
class Tally:
    """Events since the last StepStats. flight: the step collected last."""

    flight: Flight | None = None
    preemptions: int = 0
    prefix_queried: int = 0
    prefix_hit: int = 0
    output_tokens: int = 0
    num_drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0

    def stats(
        self, pool: BlockPool, held: tuple[int, int], times: tuple[float, float, float | None, float]
    ) -> StepStats:
        """What is told of that step. held: sequences running and waiting; times: duration, busy, idle and host."""
        duration_s, busy_s, idle_s, host_s = times
        flight = self.flight
        assert flight is not None, "no step was collected since the last time"
        return StepStats(
            duration_s=duration_s,
            phase="decode" if not flight.num_chunk_tokens else "mixed" if flight.num_decode else "prefill",
            num_tokens=flight.num_tokens,
            num_running=held[0],
            num_waiting=held[1],
            blocks_used=pool.num_used,
            blocks_cached=pool.num_cached,
            blocks_free=pool.num_free,
            preemptions=self.preemptions,
            prefix_queried_tokens=self.prefix_queried,
            prefix_hit_tokens=self.prefix_hit,
            prompt_tokens=flight.num_chunk_tokens,
            output_tokens=self.output_tokens,
            busy_s=busy_s,
            idle_s=idle_s,
            host_s=host_s,
            num_drafts=self.num_drafts,
            draft_tokens=self.draft_tokens,
            accepted_tokens=self.accepted_tokens,
        )
