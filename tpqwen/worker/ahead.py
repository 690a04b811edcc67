"""CUDA graphs captured before they are needed, one in each idle step.

A graph that is captured when it is first needed holds every running stream up, for 60 ms, and for seconds where its
kernels have never been compiled. So the engine makes idle steps while nobody waits (engine/loop.py). All ranks take the
same graphs in the same order, since a capture runs collectives; the most usual come first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from tpqwen.worker.graphs import DecodeGraphs, buckets
from tpqwen.worker.mixed import TOKENS, MixedGraphs, row_buckets
from tpqwen.worker.sampler import USUAL_KINDS


def captures(decode: DecodeGraphs, mixed: MixedGraphs, max_rows: int) -> Iterator[Callable[[], None]]:
    """What to call in one idle step after another. A graph that has been captured meanwhile is passed over at once."""
    for kind in USUAL_KINDS:
        for width in buckets(max_rows):
            yield partial(decode.prepare, width, kind)
        for tokens in TOKENS:
            for rows in row_buckets(max_rows):
                yield partial(mixed.prepare, rows, tokens, kind)


def num_captures(max_rows: int) -> int:
    """How many `captures` yields."""
    return len(USUAL_KINDS) * (len(buckets(max_rows)) + len(TOKENS) * len(row_buckets(max_rows)))
