"""Speculative passes as CUDA graphs, one per bucket of rows, number of drafted tokens and kind of sampling.

Every row runs its last token and as many drafted ones, so the shapes are fixed; how far a row advances is the device's
business until the host reads it. On a CPU the same calls run eagerly.
"""

from __future__ import annotations

import torch

from tpqwen.kernels.draft_reference import SKIPPED
from tpqwen.step import Ints
from tpqwen.worker.graphs import DecodeGraphs, capture
from tpqwen.worker.runner import Runner
from tpqwen.worker.sampler import SampleKind

Key = tuple[int, SampleKind, int]  # bucket of rows, sampling, tokens drafted for a row


class DraftGraphs:
    """Captured speculative passes over the rows that decode."""

    def __init__(self, runner: Runner, graphs: DecodeGraphs, *, enabled: bool) -> None:
        self._runner = runner
        self._decode = graphs
        self._enabled = enabled
        self._graphs: dict[Key, torch.cuda.CUDAGraph] = {}

    @torch.inference_mode()
    def run(self, kind: SampleKind, count: int) -> None:
        """One speculative step of the current rows; `accepted` reads what it leaves in the ring."""
        if not self._enabled:
            self._runner.speculate(self._decode.rows, kind, count)
            return
        key = (self._decode.width, kind, count)
        self.prepare(*key)
        self._graphs[key].replay()

    @torch.inference_mode()
    def prepare(self, width: int, kind: SampleKind, count: int) -> bool:
        """As DecodeGraphs.prepare."""
        if (width, kind, count) in self._graphs:
            return False
        graph, _ = capture(self._decode, width, lambda slots_B: self._runner.speculate(slots_B, kind, count))
        self._graphs[width, kind, count] = graph
        return True

    @torch.inference_mode()
    def launch(self, width: int, kind: SampleKind, count: int) -> None:
        """As DecodeGraphs.launch."""
        self._runner.speculate(self._decode.slots[:width], kind, count)

    def forget(self) -> None:
        """As DecodeGraphs.forget."""
        self._graphs.clear()


def accepted(ring_row: Ints, num_rows: int, count: int) -> tuple[Ints, Ints, tuple[int, ...]]:
    """What a speculative pass gave: the tokens of all rows, one row after another; how many each has; the bad rows."""
    tokens = ring_row[: num_rows * (count + 1)].reshape(num_rows, count + 1)
    kept = tokens != SKIPPED
    bad = (tokens == -1).any(axis=1)
    return tokens[kept], kept.sum(axis=1, dtype="<i4"), tuple(bad.nonzero()[0].tolist())
