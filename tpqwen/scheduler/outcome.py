"""The deltas of a step's tokens: arrays for most rows, an object of its own only where there is more to say."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import compress
from typing import TypeVar

import numpy as np

from tpqwen.request import Delta, Deltas
from tpqwen.scheduler.rows import Longs, Mask, RowSet
from tpqwen.step import Ints, packed

T = TypeVar("T")


def as_deltas(rows: RowSet, tokens: Ints, index: Longs, own: Mask) -> tuple[Deltas, dict[int, Delta]]:
    """Deltas of the rows' tokens at these output indexes. own: which get an object; those are returned by row, too."""
    if not own.any():
        return Deltas(rows.ids, packed(index), tokens.tobytes()), {}
    others = {
        i: Delta(id=rows.ids[i], index=int(index[i]), token_ids=[int(tokens[i])]) for i in np.flatnonzero(own).tolist()
    }
    single = ~own
    ids = list(compress(rows.ids, single.tolist()))
    return Deltas(ids, packed(index[single]), packed(tokens[single]), list(others.values())), others


def by_live_row(values: Iterable[tuple[int, T]], live: Mask | None) -> dict[int, T]:
    """Values by row of a step -> by its place among the live ones. live None: all of them are."""
    if live is None:
        return dict(values)
    place = np.cumsum(live) - 1
    return {int(place[row]): value for row, value in values if live[row]}
