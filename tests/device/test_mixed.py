"""Passes with chunks as graphs: the padding, and on a GPU the same answers as launched kernel by kernel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tiny import tiny_checkpoint
from tpqwen import LLM, SamplingParams
from tpqwen.config import Config
from tpqwen.offline import OfflineEngine
from tpqwen.step import Chunk, packed
from tpqwen.worker.ahead import captures, num_captures
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
def test_graphs_captured_ahead_answer_as_those_captured_when_needed() -> None:
    options = {"dtype": "float32", "device": "cuda", "max_batched_tokens": 70, "max_num_seqs": 8}

    def answers(ahead: bool) -> list[list[int]]:
        engine = OfflineEngine(Config.load(options, {}))
        while ahead and engine.core.can_prepare:
            engine.core.prepare()
        params = SamplingParams(temperature=0.7, top_k=20, seed=3, max_tokens=30)
        requests = [engine.request(list(range(3, 3 + n)), params) for n in (5, 17, 60, 100, 250, 8)]
        found: dict[str, list[int]] = {r.id: [] for r in requests}
        for deltas in engine.run(requests):
            for delta in deltas:
                found[delta.id] += delta.token_ids
        engine.close()
        return [found[r.id] for r in requests]

    assert answers(True) == answers(False)


def test_there_are_as_many_captures_as_idle_steps_are_made_for() -> None:
    captured = []

    class Graphs:
        def prepare(self, *key: object) -> None:
            captured.append(key)

    graphs: Any = Graphs()
    for max_rows in (1, 8, 256):
        captured.clear()
        for capture in captures(graphs, graphs, max_rows):
            capture()
        assert len(captured) == len(set(captured)) == num_captures(max_rows)


def test_an_idle_step_captures_one_graph(tmp_path: Path) -> None:
    engine = OfflineEngine(Config.load({"model": str(tiny_checkpoint(tmp_path)), "device": "cpu"}, {}))
    worker, done = engine.executor._worker, []
    assert not engine.core.can_prepare, "there are no graphs on a CPU"
    worker.graphs.ahead = iter([lambda: done.append(1), lambda: done.append(2)])
    for count in (1, 2, 2):
        engine.core.prepare()
        assert len(done) == count
    engine.close()


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
