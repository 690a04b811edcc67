"""Which slice of a full tensor a rank owns, as data: no torch, no processes, no branches on the TP degree in the model.

A parameter is made of parts (q, k, v or gate, up or the whole); each part comes from one checkpoint tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

from tpqwen.errors import ConfigError


@dataclass(frozen=True)
class ShardSpec:
    """How one full tensor [rows, columns...] is divided: `units` equal units along `axis`, or replicated (axis None).

    units is what may not be cut (heads, single rows). With more ranks than units each unit is held by several ranks.
    padded: units are padded up to a multiple of the ranks; the last ranks' padding stays zero.
    """

    shape: tuple[int, ...]
    axis: int | None = None
    units: int = 1
    padded: bool = False

    def span(self, rank: int, size: int) -> tuple[int, int]:
        """First index and length of this rank's slice of the full tensor along axis (padding not counted)."""
        if self.axis is None:
            raise ValueError("a replicated tensor has no span")
        unit = self.shape[self.axis] // self.units
        if self.padded:
            count = self.local_units(size)
            first = min(rank * count, self.units)
            return first * unit, (min(first + count, self.units) - first) * unit
        if size > self.units:
            return rank * self.units // size * unit, unit
        return rank * (self.units // size) * unit, self.units // size * unit

    def local_units(self, size: int) -> int:
        """Units of one rank, padding included. Raises ConfigError when they do not divide."""
        if self.padded:
            return -(-self.units // size)
        if self.units % size and size % self.units:
            raise ConfigError(f"{self.units} units cannot be divided over tp {size}")
        return max(1, self.units // size)

    def local_shape(self, size: int) -> tuple[int, ...]:
        """Shape of one rank's slice, padding included."""
        if self.axis is None:
            return self.shape
        local = list(self.shape)
        local[self.axis] = self.local_units(size) * (self.shape[self.axis] // self.units)
        return tuple(local)

    def index(self, rank: int, size: int) -> tuple[slice, ...]:
        """Slices that pick this rank's part out of the full tensor."""
        if self.axis is None:
            return tuple(slice(0, n) for n in self.shape)
        first, length = self.span(rank, size)
        return tuple(slice(first, first + length) if i == self.axis else slice(0, n) for i, n in enumerate(self.shape))


@dataclass(frozen=True)
class Part:
    """One checkpoint tensor inside a parameter: its slice starts at row `offset` of the local parameter."""

    name: str
    spec: ShardSpec
    offset: int = 0
