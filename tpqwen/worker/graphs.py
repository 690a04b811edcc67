"""Decode passes as CUDA graphs, one per batch bucket and kind of sampling, captured ahead or when first needed.

With a long row among the decode rows a pass has a variant of its own, where `Runner.has_wide` says so: wide.
The rows' slots lie in a buffer at a fixed address, so a graph stays valid whatever sequences the rows hold. Graphs
share one memory pool: only one runs at a time. On a CPU the same calls run eagerly.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import TypeVar

import torch

from tpqwen.kernels import ops
from tpqwen.parallel.group import TPGroup
from tpqwen.step import row_bucket
from tpqwen.worker.runner import Runner, Sampled
from tpqwen.worker.sampler import SampleKind

NO_SAMPLING = None
T = TypeVar("T")
Key = tuple[int, SampleKind | None, bool]  # bucket, sampling, wide


def buckets(max_rows: int) -> list[int]:
    """The sizes of row_bucket; the last one holds max_rows."""
    return sorted({min(row_bucket(rows), max_rows) for rows in range(1, max_rows + 1)})


class DecodeGraphs:
    """Captured decode passes and the buffer of slots that they read."""

    def __init__(self, runner: Runner, group: TPGroup, max_rows: int, *, enabled: bool) -> None:
        self._runner = runner
        self._group = group
        self._buckets = buckets(max_rows)
        self._enabled = enabled
        self.state = runner.state.tensors
        device = self.state.length.device
        self.slots = torch.full((max_rows,), self.state.padding_slot, dtype=torch.int32, device=device)
        self._graphs: dict[Key, tuple[torch.cuda.CUDAGraph, Sampled | torch.Tensor]] = {}
        self.pool = torch.cuda.graph_pool_handle() if enabled else None
        self.num_captured = 0  # passes so far, those with chunks included
        self.wide = False  # StepInput.wide of the next pass
        self._count = 0
        self._width = self._buckets[0]  # the bucket that holds as many

    def set_rows(self, slots_B: torch.Tensor) -> None:
        """These slots (int32, on the device or in pinned memory) decode from now on."""
        self._count = len(slots_B)
        self._width = self._buckets[min(bisect_left(self._buckets, self._count), len(self._buckets) - 1)]
        ops.set_rows(self.slots, slots_B, self.state.padding_slot)

    @property
    def num_rows(self) -> int:
        """How many slots decode."""
        return self._count

    @property
    def width(self) -> int:
        """The bucket that they run as."""
        return self._width

    @property
    def rows(self) -> torch.Tensor:
        """The slots that decode, without padding."""
        return self.slots[: self._count]

    def decode(self, kind: SampleKind) -> Sampled:
        """One decode step of the current rows, padded to the bucket; the first `count` results are real."""
        if not self._enabled:
            with torch.inference_mode():
                return self._runner.decode(self.rows, kind, wide=self.wide)
        result = self._replay(kind)
        assert isinstance(result, Sampled)
        return result

    def decode_logits(self) -> torch.Tensor:
        """One decode step up to the local logits of the real rows."""
        if not self._enabled:
            return self._runner.decode_logits(self.rows, wide=self.wide)
        result = self._replay(NO_SAMPLING)
        assert isinstance(result, torch.Tensor)
        return result[: self._count]

    def is_wide(self, width: int) -> bool:
        """Whether the next pass, if it is one of this bucket, has to be the wide variant."""
        return self.wide and self._runner.has_wide(width)

    def prepare(self, width: int, kind: SampleKind | None, wide: bool) -> bool:
        """Capture a variant of a bucket's pass. False if it has been, and there was nothing to do."""
        if (width, kind, wide) in self._graphs:
            return False
        self._graphs[width, kind, wide] = self._capture(width, kind, wide)
        return True

    @torch.inference_mode()
    def launch(self, width: int, kind: SampleKind | None, wide: bool) -> None:
        """The same pass once, kernel by kernel, over whatever the buffer holds."""
        self._pass(kind, wide)(self.slots[:width])

    def settle(self) -> None:
        """Wait until the device has done all that was launched. Raises ConnectionError when the group is called off."""
        if self._enabled:
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()  # type: ignore[no-untyped-call]
            self._group.wait_until(done.query)

    def forget(self) -> None:
        """Destroy the captured passes, at once and whoever else still knows this object."""
        self._graphs.clear()

    def _replay(self, kind: SampleKind | None) -> Sampled | torch.Tensor:
        key = (self._width, kind, self.is_wide(self._width))
        self.prepare(*key)
        graph, result = self._graphs[key]
        graph.replay()
        return result

    @torch.inference_mode()
    def _capture(
        self, width: int, kind: SampleKind | None, wide: bool
    ) -> tuple[torch.cuda.CUDAGraph, Sampled | torch.Tensor]:
        return capture(self, width, self._pass(kind, wide))

    def _pass(self, kind: SampleKind | None, wide: bool) -> Callable[[torch.Tensor], Sampled | torch.Tensor]:
        runner = self._runner
        if kind is None:
            return lambda slots_B: runner.decode_logits(slots_B, wide=wide)
        return lambda slots_B: runner.decode(slots_B, kind, wide=wide)


def capture(graphs: DecodeGraphs, width: int, run: Callable[[torch.Tensor], T]) -> tuple[torch.cuda.CUDAGraph, T]:
    """Warm up and capture a pass over the first `width` of the graphs' rows.

    The warm-up runs padding rows only and is taken back, so that no slot moves. Raises ConnectionError when the group
    is called off meanwhile: the host waits for other ranks only in `settle`.
    """
    slots, state = graphs.slots[:width], graphs.state
    real, turn = slots.clone(), state.turn.clone()
    slots.fill_(state.padding_slot)
    run(slots)
    graphs.settle()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=graphs.pool):
        result = run(slots)
    state.turn.copy_(turn)
    slots.copy_(real)
    graphs.num_captured += 1
    return graph, result
