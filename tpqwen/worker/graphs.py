"""Decode passes as CUDA graphs, one per batch bucket and kind of sampling, captured when first needed.

The rows' slots lie in a buffer at a fixed address, so a graph stays valid whatever sequences the rows hold. Graphs
share one memory pool: only one runs at a time. On a CPU the same calls run eagerly.
"""

from __future__ import annotations

import torch

from tpqwen.kernels import ops
from tpqwen.worker.runner import Runner, Sampled
from tpqwen.worker.sampler import SampleKind

NO_SAMPLING = None


def buckets(max_rows: int) -> list[int]:
    """1, 2, 4, 8, then every 8 up to 64, every 16 up to 256, every 64 beyond; the last one holds max_rows."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_rows + 64, 64)]
    return [s for s in sizes if s < max_rows] + [max_rows]


class DecodeGraphs:
    """Captured decode passes and the buffer of slots that they read."""

    def __init__(self, runner: Runner, max_rows: int, *, enabled: bool) -> None:
        self._runner = runner
        self._buckets = buckets(max_rows)
        self._enabled = enabled
        state = runner.state.tensors
        self._slots = torch.full((max_rows,), state.padding_slot, dtype=torch.int32, device=state.length.device)
        self._graphs: dict[tuple[int, SampleKind | None], tuple[torch.cuda.CUDAGraph, Sampled | torch.Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle() if enabled else None
        self._count = 0

    def set_rows(self, slots_B: torch.Tensor) -> None:
        """These slots (int32, on the device or in pinned memory) decode from now on."""
        self._count = len(slots_B)
        ops.set_rows(self._slots, slots_B, self._runner.state.tensors.padding_slot)

    @property
    def rows(self) -> torch.Tensor:
        """The slots that decode, without padding."""
        return self._slots[: self._count]

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

    def _replay(self, kind: SampleKind | None) -> Sampled | torch.Tensor:
        width = next(b for b in self._buckets if b >= self._count)
        if (width, kind) not in self._graphs:
            self._graphs[width, kind] = self._capture(width, kind)
        graph, result = self._graphs[width, kind]
        graph.replay()
        return result

    def _capture(self, width: int, kind: SampleKind | None) -> tuple[torch.cuda.CUDAGraph, Sampled | torch.Tensor]:
        """Warm up and capture. The warm-up pass runs padding rows only and is taken back, so that no slot moves."""
        slots, state = self._slots[:width], self._runner.state.tensors
        real = slots.clone()
        slots.fill_(state.padding_slot)

        def run() -> Sampled | torch.Tensor:
            return self._runner.decode_logits(slots) if kind is None else self._runner.decode(slots, kind)

        run()
        state.turn.sub_(1)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = run()
        slots.copy_(real)
        return graph, result
