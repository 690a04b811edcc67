"""Passes as graphs: which one a step takes, the padding of chunks, and on a GPU the same answers as launched singly."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.tiny import tiny_checkpoint
from tpqwen import LLM, SamplingParams
from tpqwen.config import Config
from tpqwen.kernels import ops
from tpqwen.offline import OfflineEngine
from tpqwen.parallel.group import TPGroup
from tpqwen.scheduler import rows
from tpqwen.step import FEW_CHUNKS, MANY_CHUNKS, Chunk, packed
from tpqwen.worker.batch import Stager, chunk_parts
from tpqwen.worker.graphs import DecodeGraphs
from tpqwen.worker.mixed import MixedGraphs, pad
from tpqwen.worker.runner import Runner, Sampled
from tpqwen.worker.sampler import SampleKind
from tpqwen.worker.worker import Where

GREEDY = SampleKind()


def test_padding_computes_and_samples_nothing() -> None:
    chunks = (Chunk(3, 10, packed([7, 8, 9]), True), Chunk(1, 0, packed([4, 5]), False))
    ids, positions, token_slots, slots, query_start, lengths, sampled, sampled_slots = pad(chunk_parts(chunks), 8, 99)
    assert ids.tolist() == [7, 8, 9, 4, 5, 0, 0, 0]
    assert positions.tolist() == [10, 11, 12, 0, 1, 0, 0, 0]
    assert token_slots.tolist() == [3, 3, 3, 1, 1, 99, 99, 99]
    assert slots.tolist() == [3, 1] + [99] * (FEW_CHUNKS - 2)
    assert query_start.tolist() == [0, 3, 5] + [5] * (FEW_CHUNKS - 2), "chunks of padding are empty"
    assert lengths.tolist() == [13, 2] + [0] * (FEW_CHUNKS - 2)
    assert (sampled.tolist()[0], sampled_slots.tolist()) == (2, [3] + [99] * (FEW_CHUNKS - 1))


def test_the_tokens_of_a_padded_pass_are_found_in_the_ring() -> None:
    ring = np.arange(20, dtype=np.int32)
    assert Where(3, 5, None).take(ring).tolist() == [0, 1, 2, 3, 4]
    assert Where(3, 5, 8).take(ring).tolist() == [0, 1, 2, 8, 9]
    assert Where(0, 1, 0).take(ring).tolist() == [0]


class Graph:
    """Stands for a CUDAGraph, and knows what it is of."""

    def __init__(self, key: Any, replayed: list[Any]) -> None:
        self.replay = lambda: replayed.append(key)


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_long_row_takes_a_variant_of_the_pass_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deterministic: bool
) -> None:
    options = {"model": str(tiny_checkpoint(tmp_path)), "max_num_seqs": 64, "deterministic": deterministic}
    engine = OfflineEngine(Config.load({**options, "device": "cpu"}, {}))
    runner: Runner = engine.executor._worker.runner  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(DecodeGraphs, "settle", lambda self: None)
    replayed: list[Any] = []
    results = {DecodeGraphs: Sampled(torch.zeros(64)), MixedGraphs: None}
    for kind, result in results.items():
        monkeypatch.setattr(kind, "_capture", lambda self, *key, result=result: (Graph(key, replayed), result))
    decode = DecodeGraphs(runner, TPGroup.single(), 64, enabled=True)
    mixed = MixedGraphs(runner, decode, 64, runner.cache.block_size, enabled=True)
    parts, stager = chunk_parts((Chunk(63, 0, packed([4, 5]), True),)), Stager(torch.device("cpu"), 1)
    for count, decode.wide in ((0, True), (1, True), (40, False), (40, True), (40, True)):
        with torch.inference_mode():
            decode.set_rows(torch.arange(count, dtype=torch.int32))
            mixed.run(parts, GREEDY, stager)
        if count:
            decode.decode(GREEDY)
    assert runner.has_wide(40) != deterministic and runner.has_wide(64) != deterministic
    assert not runner.has_wide(0) and not runner.has_wide(1) and not runner.has_wide(8)
    wide = not deterministic
    assert replayed == [
        (0, 64, GREEDY, False),
        *((8, 64, GREEDY, False), (1, GREEDY, False)),
        *((64, 64, GREEDY, False), (40, GREEDY, False)),
        *((64, 64, GREEDY, wide), (40, GREEDY, wide)) * 2,
    ]
    engine.close()


def test_what_the_step_says_of_long_rows_reaches_every_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "LONG_ROW", 24)
    seen: list[tuple[bool, bool, int]] = []
    attend = ops.attend

    def watched(*args: Any, **options: Any) -> torch.Tensor:
        ctx = args[5]
        if args[4] == 0:
            seen.append((ctx.wide, ctx.prefill is not None, max(ctx.decode_lengths_B.tolist(), default=0)))
        return attend(*args, **options)

    monkeypatch.setattr(ops, "attend", watched)
    options = {"model": str(tiny_checkpoint(tmp_path)), "device": "cpu", "max_batched_tokens": 64}
    engine = OfflineEngine(Config.load(options, {}))
    for lengths, logprobs in product(((5,), (30, 200)), (None, 2)):
        params = SamplingParams(max_tokens=12, ignore_eos=True, logprobs=logprobs)
        for _ in engine.run([engine.request(list(range(n)), params) for n in lengths]):
            pass
    engine.close()
    assert all(wide == (length > 24) for wide, _, length in seen)
    assert {(wide, mixed) for wide, mixed, _ in seen} == {(w, m) for w in (False, True) for m in (False, True)}


@pytest.mark.gpu
def test_a_graph_answers_as_single_launches_do(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = ["Count to twenty.", "What is 17 + 25?", "Tell me a story about a boat. " * 20, "Hello!", "Copy: a b c d"]
    greedy = SamplingParams(temperature=0, max_tokens=60)
    seeded = SamplingParams(temperature=0.7, top_k=20, seed=3, max_tokens=60)

    def answers() -> list[list[int]]:
        with LLM(dtype="float32", device="cuda", max_batched_tokens=70, max_num_seqs=8, num_kv_blocks=400) as llm:
            return [o.token_ids for p in (greedy, seeded) for o in llm.generate(prompts, p)]

    graphs = answers()
    monkeypatch.setattr(MixedGraphs, "fits", lambda *_: False)
    assert graphs == answers()


@pytest.mark.parametrize(
    ("count", "sampled", "width"),
    [(0, 3, 0), (1, 3, 8), (9, 0, 32), (33, 20, 40), (33, 30, 33), (40, 8, 40)],
)
def test_rows_beside_chunks_are_padded_where_the_ring_has_room(count: int, sampled: int, width: int) -> None:
    state = SimpleNamespace(tensors=SimpleNamespace(ring=torch.zeros(8, 40 + MANY_CHUNKS - 12)))
    decode = SimpleNamespace(num_rows=count, slots=torch.arange(40), rows=torch.arange(40)[:count])
    graphs: Any = (SimpleNamespace(state=state), decode, 40, 16)
    assert len(MixedGraphs(*graphs, enabled=True).rows(sampled)) == width
    assert len(MixedGraphs(*graphs, enabled=False).rows(sampled)) == count


@pytest.mark.gpu
def test_wide_passes_answer_as_the_usual_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row of 1,500 tokens, which the wide plan divides, among up to forty of a few dozen that come and go."""

    def answers() -> list[list[int]]:
        options = {"dtype": "float32", "device": "cuda", "max_batched_tokens": 512, "max_num_seqs": 41}
        options["num_kv_blocks"] = 400
        engine = OfflineEngine(Config.load(options, {}))
        sizes = [(1500, 120), *((20, 20 + 2 * i) for i in range(48))]
        requests = []
        for i, (prompt, output) in enumerate(sizes, 1):
            params = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
            requests.append(engine.request([5 + i * k % 4000 for k in range(prompt)], params))
        tokens: dict[str, list[int]] = {r.id: [] for r in requests}
        for deltas in engine.run(requests):
            for delta in deltas:
                tokens[delta.id] += delta.token_ids
        engine.close()
        return [*tokens.values()]

    usual = answers()
    captured: set[tuple[str, bool]] = set()
    for graphs in (DecodeGraphs, MixedGraphs):
        prepare = graphs.prepare

        def watched(self: Any, *key: Any, prepare: Any = prepare) -> bool:
            captured.add((type(self).__name__, key[-1]))
            return bool(prepare(self, *key))

        monkeypatch.setattr(graphs, "prepare", watched)
    monkeypatch.setattr(rows, "LONG_ROW", 1000)
    assert answers() == usual
    assert captured == set(product(("DecodeGraphs", "MixedGraphs"), (False, True)))
