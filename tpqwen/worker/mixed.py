"""Passes over prompt chunks, with or without decode rows, as CUDA graphs: one per bucket of rows, tokens and sampling.

A pass of a few hundred tokens is over before Python has launched it kernel by kernel. Chunks are padded up to a bucket:
T tokens of which the last may be none's, C chunks (step.chunk_places) of which the last may be empty. Longer passes run
eagerly; the scheduler makes them where the device is the slower of the two. Wide passes as in worker/graphs.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from tpqwen.step import Ints, chunk_places, token_bucket
from tpqwen.worker.batch import Stager, blank_prompt, chunk_batch
from tpqwen.worker.graphs import DecodeGraphs, capture
from tpqwen.worker.runner import Runner, Sampled
from tpqwen.worker.sampler import SampleKind

ROWS = (0, 8, 32, 64, 128, 256, 512)
Key = tuple[int, int, SampleKind, bool]  # buckets of rows and tokens, sampling, wide


def row_buckets(max_rows: int) -> list[int]:
    """Numbers of decode rows; the last one holds max_rows."""
    return [r for r in ROWS if r < max_rows] + [max_rows]


class MixedGraphs:
    """Captured passes with chunks, and the buffers of chunks that they read."""

    def __init__(self, runner: Runner, graphs: DecodeGraphs, max_rows: int, block_size: int, *, enabled: bool) -> None:
        self._runner = runner
        self._decode = graphs
        self._rows = row_buckets(max_rows)
        self._block_size = block_size
        self._enabled = enabled
        self._chunks: dict[int, torch.Tensor] = {}  # T -> all integers of a pass, in the order of chunk_parts
        self._graphs: dict[Key, tuple[torch.cuda.CUDAGraph, Sampled | None]] = {}

    def fits(self, num_tokens: int, num_chunks: int, kind: SampleKind) -> bool:
        """Whether a pass over these chunks has a graph."""
        return self._enabled and token_bucket(num_tokens, num_chunks) > 0 and kind.in_graph

    def rows(self, num_sampled: int) -> torch.Tensor:
        """The decode rows for a pass that is launched kernel by kernel and samples so many chunks: padded as with a
        graph, so that it needs no kernel compiled for just as many, unless the ring has no room for them."""
        count, slots, ring = self._decode.num_rows, self._decode.slots, self._runner.state.tensors.ring
        width = next(r for r in self._rows if r >= count)
        if not self._enabled or not count or width + num_sampled > ring.shape[1]:
            return self._decode.rows
        return slots[:width]

    def run(self, parts: Sequence[Ints], kind: SampleKind, stager: Stager) -> int:
        """One pass over the decode rows and these chunks. Returns the row from which on the chunks' tokens stand."""
        tokens = token_bucket(parts[0].size, parts[3].size)
        width = next(r for r in self._rows if r >= self._decode.num_rows)
        padding = self._runner.state.tensors.padding_slot
        padded = pad(parts, tokens, padding)
        key = (width, tokens, kind, self._decode.is_wide(width))
        self.prepare(*key)
        self._buffer(tokens).copy_(stager.flat(padded), non_blocking=True)
        self._graphs[key][0].replay()
        return width

    @torch.inference_mode()
    def prepare(self, width: int, tokens: int, kind: SampleKind, wide: bool) -> bool:
        """As DecodeGraphs.prepare."""
        if (width, tokens, kind, wide) in self._graphs:
            return False
        self._decode.settle()  # a copy from memory that is not pinned waits for the device, and nothing could end that
        self._clear(tokens)
        self._graphs[width, tokens, kind, wide] = self._capture(width, tokens, kind, wide)
        return True

    @torch.inference_mode()
    def launch(self, width: int, tokens: int, kind: SampleKind, wide: bool) -> None:
        """As DecodeGraphs.launch, with nobody's chunks."""
        self._clear(tokens)
        self._pass(tokens, kind, wide)(self._decode.slots[:width])

    @torch.inference_mode()
    def try_prompt(self, num_tokens: int) -> None:
        """Run a whole prompt of nobody's through one layer, for what has to be made when its shape first comes."""
        runner, state = self._runner, self._runner.state
        turn = state.tensors.turn.clone()
        prompt = blank_prompt(state.tensors.padding_slot, num_tokens, state, self._block_size)
        _, context = runner.mixed_context(self._decode.slots[:0], prompt)
        state.tensors.turn.copy_(turn)
        hidden, _ = runner.model.attention[0](runner.blank_hidden(num_tokens), context)
        runner.model.mlp[0](hidden)

    def forget(self) -> None:
        """As DecodeGraphs.forget."""
        self._graphs.clear()

    def _buffer(self, tokens: int) -> torch.Tensor:
        if tokens not in self._chunks:
            size = sum(p.size for p in pad(_nothing(), tokens, 0))
            device = self._runner.state.tensors.length.device
            self._chunks[tokens] = torch.zeros(size, dtype=torch.int32, device=device)
        return self._chunks[tokens]

    def _clear(self, tokens: int) -> None:
        nothing = pad(_nothing(), tokens, self._runner.state.tensors.padding_slot)
        self._buffer(tokens).copy_(torch.from_numpy(np.concatenate(nothing)))

    def _capture(
        self, width: int, tokens: int, kind: SampleKind, wide: bool
    ) -> tuple[torch.cuda.CUDAGraph, Sampled | None]:
        return capture(self._decode, width, self._pass(tokens, kind, wide))

    def _pass(self, tokens: int, kind: SampleKind, wide: bool) -> Callable[[torch.Tensor], Sampled | None]:
        sizes = [p.size for p in pad(_nothing(), tokens, 0)]
        parts = list(torch.split(self._buffer(tokens), sizes))
        runner, size = self._runner, self._block_size

        def run(slots_B: torch.Tensor) -> Sampled | None:
            chunks = chunk_batch(parts, graph_lengths(tokens), runner.state, size)
            return runner.mixed(slots_B, chunks, kind, (), wide=wide)

        return run


def pad(parts: Sequence[Ints], tokens: int, padding_slot: int) -> list[Ints]:
    """chunk_parts filled up to `tokens` tokens and a graph's places with chunks that compute and sample nothing."""
    places = chunk_places(tokens)
    ids, positions, token_slots, slots, query_start, lengths, sampled, sampled_slots = parts

    def filled(part: Ints, size: int, value: int) -> Ints:
        return np.concatenate([part, np.full(size - part.size, value, np.int32)])

    return [
        filled(ids, tokens, 0),
        filled(positions, tokens, 0),
        filled(token_slots, tokens, padding_slot),
        filled(slots, places, padding_slot),
        filled(query_start, places + 1, ids.size),
        filled(lengths, places, 0),
        filled(sampled, places, 0),
        filled(sampled_slots, places, padding_slot),
    ]


def graph_lengths(tokens: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """num_query and num_context of a graph's chunks, as its capture takes them. None counts as a whole prompt: which of
    them is one changes from pass to pass."""
    others = chunk_places(tokens) - 1
    return (tokens, *[0] * others), (tokens + 1, *[1] * others)


def _nothing() -> list[Ints]:
    none = np.empty(0, np.int32)
    return [none, none, none, none, np.zeros(1, np.int32), none, none, none]
