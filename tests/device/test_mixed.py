"""Passes with chunks as graphs: the padding, and on a GPU the same answers as launched kernel by kernel."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tpqwen import LLM, SamplingParams
from tpqwen.step import Chunk, packed
from tpqwen.worker.batch import chunk_parts
from tpqwen.worker.mixed import MixedGraphs, pad
from tpqwen.worker.slots import MIXED_CHUNKS
from tpqwen.worker.worker import Where


def test_padding_computes_and_samples_nothing() -> None:
    chunks = (Chunk(3, 10, packed([7, 8, 9]), True), Chunk(1, 0, packed([4, 5]), False))
    ids, positions, token_slots, slots, query_start, lengths, sampled, sampled_slots = pad(chunk_parts(chunks), 8, 99)
    assert ids.tolist() == [7, 8, 9, 4, 5, 0, 0, 0]
    assert positions.tolist() == [10, 11, 12, 0, 1, 0, 0, 0]
    assert token_slots.tolist() == [3, 3, 3, 1, 1, 99, 99, 99]
    assert slots.tolist() == [3, 1] + [99] * (MIXED_CHUNKS - 2)
    assert query_start.tolist() == [0, 3, 5] + [5] * (MIXED_CHUNKS - 2), "chunks of padding are empty"
    assert lengths.tolist() == [13, 2] + [0] * (MIXED_CHUNKS - 2)
    assert (sampled.tolist()[0], sampled_slots.tolist()) == (2, [3] + [99] * (MIXED_CHUNKS - 1))


def test_the_tokens_of_a_padded_pass_are_found_in_the_ring() -> None:
    ring = np.arange(20, dtype=np.int32)
    assert Where(3, 5, None).take(ring).tolist() == [0, 1, 2, 3, 4]
    assert Where(3, 5, 8).take(ring).tolist() == [0, 1, 2, 8, 9]
    assert Where(0, 1, 0).take(ring).tolist() == [0]


@pytest.mark.gpu
def test_a_graph_answers_as_single_launches_do(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = ["Count to twenty.", "What is 17 + 25?", "Tell me a story about a boat. " * 20, "Hello!", "Copy: a b c d"]
    greedy = SamplingParams(temperature=0, max_tokens=60)
    seeded = SamplingParams(temperature=0.7, top_k=20, seed=3, max_tokens=60)

    def answers() -> list[list[int]]:
        with LLM(dtype="float32", device="cuda", max_batched_tokens=70, max_num_seqs=8) as llm:
            return [o.token_ids for p in (greedy, seeded) for o in llm.generate(prompts, p)]

    graphs = answers()
    monkeypatch.setattr(MixedGraphs, "fits", lambda *_: False)
    assert graphs == answers()


@pytest.mark.parametrize(
    ("count", "sampled", "width"),
    [(0, 3, 0), (1, 3, 8), (9, 0, 32), (33, 20, 40), (33, 30, 33), (40, 8, 40)],
)
def test_rows_beside_chunks_are_padded_where_the_ring_has_room(count: int, sampled: int, width: int) -> None:
    state = SimpleNamespace(tensors=SimpleNamespace(ring=torch.zeros(8, 40 + MIXED_CHUNKS + 12)))
    decode = SimpleNamespace(num_rows=count, slots=torch.arange(40), rows=torch.arange(40)[:count])
    graphs: Any = (SimpleNamespace(state=state), decode, 40, 16)
    assert len(MixedGraphs(*graphs, enabled=True).rows(sampled)) == width
    assert len(MixedGraphs(*graphs, enabled=False).rows(sampled)) == count
