"""Decode passes as CUDA graphs, one per batch bucket and kind of sampling, captured when first needed.

The rows live in buffers at fixed addresses, so a graph stays valid whatever sequences the rows hold. Graphs share one
memory pool: only one runs at a time. On a CPU the same calls run eagerly.
"""

from __future__ import annotations

import torch

from tpqwen.worker.runner import DecodeRows, Runner, Sampled
from tpqwen.worker.sampler import SampleKind

NO_SAMPLING = None


def buckets(max_rows: int) -> list[int]:
    """1, 2, 4, 8, then every 8 up to 64, every 16 up to 256, every 64 beyond; the last one holds max_rows."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_rows + 64, 64)]
    return [s for s in sizes if s < max_rows] + [max_rows]


class DecodeGraphs:
    """Captured decode passes and the row buffers they read."""

    def __init__(self, runner: Runner, max_rows: int, *, enabled: bool) -> None:
        self._runner = runner
        self._buckets = buckets(max_rows)
        self._enabled = enabled
        state = runner.state
        slots = torch.full((max_rows,), state.padding_slot, dtype=torch.int64, device=state.length.device)
        self._rows = DecodeRows(slots, state.tables[slots], state.gather(slots))
        self._graphs: dict[tuple[int, SampleKind | None], tuple[torch.cuda.CUDAGraph, Sampled | torch.Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle() if enabled else None
        self._count = 0

    def set_rows(self, slots: torch.Tensor) -> None:
        """These slots (int64) decode from now on. Also to be called when a slot's table or parameters changed."""
        state, count = self._runner.state, slots.shape[0]
        self._rows.slots[:count] = slots
        self._rows.slots[count:] = state.padding_slot
        self._count = count
        self.refresh()

    def refresh(self) -> None:
        """Gather tables and parameters again for the rows as they are."""
        state, width = self._runner.state, self._width(self._count)
        slots = self._rows.slots[:width]
        torch.index_select(state.tables, 0, slots, out=self._rows.tables_BM[:width])
        self._rows.params.copy_(state.gather(slots))

    @property
    def rows(self) -> DecodeRows:
        """The rows without padding."""
        return self._rows.take(self._count)

    def decode(self, kind: SampleKind) -> Sampled:
        """One decode step of the current rows, padded to the bucket; the first `count` results are real."""
        if not self._enabled:
            return self._runner.decode(self.rows, kind)
        result = self._replay(kind)
        assert isinstance(result, Sampled)
        return result

    def decode_logits(self) -> torch.Tensor:
        """One decode step up to the local logits of the real rows."""
        if not self._enabled:
            return self._runner.decode_logits(self.rows)
        result = self._replay(NO_SAMPLING)
        assert isinstance(result, torch.Tensor)
        return result[: self._count]

    def _width(self, count: int) -> int:
        return next(b for b in self._buckets if b >= count) if self._enabled else count

    def _replay(self, kind: SampleKind | None) -> Sampled | torch.Tensor:
        width = self._width(self._count)
        if (width, kind) not in self._graphs:
            self._graphs[width, kind] = self._capture(self._rows.take(width), kind)
        graph, result = self._graphs[width, kind]
        graph.replay()
        return result

    def _capture(
        self, rows: DecodeRows, kind: SampleKind | None
    ) -> tuple[torch.cuda.CUDAGraph, Sampled | torch.Tensor]:
        """Warm up and capture with padding rows only, so that no slot moves."""
        real = rows.slots.clone()
        rows.slots.fill_(self._runner.state.padding_slot)

        def run() -> Sampled | torch.Tensor:
            return self._runner.decode_logits(rows) if kind is None else self._runner.decode(rows, kind)

        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = run()
        rows.slots.copy_(real)
        return graph, result
