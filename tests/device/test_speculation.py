"""Speculation through the whole engine on a CPU: token for token what ordinary steps give, and how much it accepts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.device.test_generation import Engine, prompts, request
from tests.tiny import tiny_checkpoint
from tpqwen import LLM
from tpqwen.kernels.draft_reference import SKIPPED
from tpqwen.kernels.reference import MAX_CANDIDATES
from tpqwen.request import GenerateRequest, SamplingParams
from tpqwen.scheduler.sequence import row_params
from tpqwen.scheduler.speculation import Speculation
from tpqwen.step import DRAFT_ROWS, StepInput, StepStats, ints
from tpqwen.worker import drafts
from tpqwen.worker.drafts import DraftGraphs, accepted
from tpqwen.worker.sampler import SampleKind, kind_of

KINDS = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.8),
    SamplingParams(temperature=0.7, top_k=20, top_p=0.9),
    SamplingParams(temperature=0.6, top_k=3),
]
HOSTS = [  # that no speculative step may hold
    SamplingParams(temperature=1.0, top_p=0.8),
    SamplingParams(temperature=0.9, presence_penalty=0.5),
    SamplingParams(temperature=0.0, logprobs=2),
]
Steps = list[StepInput]


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it pays depends on the machine; here it is tried in most steps, and some are ordinary."""
    random = Random(5)
    monkeypatch.setattr(Speculation, "_pays", lambda self, bucket: random.random() < 0.8)


class Watched(Engine):
    """Remembers its steps and what came of drafts."""

    def __init__(self, folder: Path, **options: object) -> None:
        super().__init__(folder, **{"speculation": "ngram", **options})
        self.steps: Steps = []
        self.drafted = self.accepted = self.rows = 0
        submit, update = self.executor.submit, self.core.scheduler.update
        self.executor.submit = lambda step: (self.steps.append(step), submit(step))[1]  # type: ignore[method-assign]

        def checked(output):  # type: ignore[no-untyped-def]
            deltas = update(output)
            tally = self.core.scheduler._tally
            self.rows += tally.num_drafts
            self.drafted += tally.draft_tokens
            self.accepted += tally.accepted_tokens
            self.core.scheduler.check()
            return deltas

        self.core.scheduler.update = checked  # type: ignore[method-assign]

    @property
    def speculative(self) -> int:
        return sum(step.speculate > 0 for step in self.steps)


def both(folder: Path, load: Callable[[], list[GenerateRequest]], **options: object) -> Watched:
    """The same load with and without speculation: equal tokens. Returns the engine with it."""
    plain, drafting = Engine(folder, **options), Watched(folder, **options)
    expected, outputs = plain.generate(load()), drafting.generate(load())
    plain.close()
    drafting.close()
    assert outputs == expected
    assert drafting.speculative, "no step speculated"
    return drafting


def load_of(count: int, kinds: list[SamplingParams], output: int = 40) -> Callable[[], list[GenerateRequest]]:
    inputs = [p * (1 + i % 3) for i, p in enumerate(prompts(count, 20, 300, seed=count))]
    return lambda: [request(str(i), p, output + i, kinds[i % len(kinds)], seed=70 + i) for i, p in enumerate(inputs)]


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("drafts", [1, 7, 15])
def test_greedy_and_seeded_rows_get_the_same_tokens(tmp_path: Path, tp: int, drafts: int) -> None:
    folder = tiny_checkpoint(tmp_path / "model")
    roomy = {"block_size": 8, "max_batched_tokens": 256, "max_model_len": 256}
    engine = both(folder, load_of(12, KINDS), tp=tp, draft_tokens=drafts, **roomy)
    assert engine.accepted > 20, "some drafts were right, so that rows advance by different numbers of tokens"
    assert all(not step.chunks and step.speculate in (0, drafts) for step in engine.steps if step.speculate)


def test_rows_that_need_the_host_are_never_in_such_a_step(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model")
    engine = both(folder, load_of(9, KINDS + HOSTS, output=20), block_size=8, max_batched_tokens=256)
    slots: dict[int, bool] = {}
    rows: list[int] = []
    for step in engine.steps:
        slots |= {a.slot: a.params.can_speculate for a in step.admits}
        rows = rows if step.decode is None else list(memoryview(step.decode).cast("i"))
        assert not step.speculate or all(slots[r] for r in rows)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_preempted_and_chunked_sequences_get_the_same_tokens(tmp_path: Path, depth: int) -> None:
    folder = tiny_checkpoint(tmp_path / "model")
    tight = {"block_size": 4, "max_batched_tokens": 48, "max_num_seqs": 5, "num_kv_blocks": 44, "max_model_len": 160}
    engine = both(folder, load_of(14, KINDS, output=60), depth=depth, **tight)
    assert engine.preemptions > 0, "the pool was meant to be too small"


def test_more_rows_than_may_speculate_do_not(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model")
    engine = both(folder, load_of(DRAFT_ROWS + 6, KINDS, output=12), block_size=8, max_batched_tokens=512)
    rows: list[int] = []
    for step in engine.steps:
        rows = rows if step.decode is None else list(memoryview(step.decode).cast("i"))
        assert not step.speculate or len(rows) <= DRAFT_ROWS


@pytest.mark.parametrize("tp", [1, 2])
def test_every_rank_knows_the_tokens_of_a_prefix_that_no_chunk_brought(tmp_path: Path, tp: int) -> None:
    folder = tiny_checkpoint(tmp_path / "model")
    shared = prompts(1, 60, 300, seed=3)[0] * 8
    options = {"prefix_cache": True, "block_size": 8, "max_batched_tokens": 64, "max_model_len": 400, "tp": tp}
    plain, drafting = Engine(folder, **options), Watched(folder, **options)
    for e in (plain, drafting):
        e.generate([request("first", shared, 1)])
    prompt = [*shared, 7]
    again = [e.generate([request("second", prompt, 60)])["second"] for e in (plain, drafting)]
    assert again[0] == again[1] and drafting.cached["second"] >= 100
    for worker in drafting.executor.workers:  # type: ignore[attr-defined]
        history = worker.runner.state.tensors.history[0].tolist()
        assert history[: len(prompt) + 60] == prompt + again[0]
    plain.close()
    drafting.close()


def test_the_last_token_allowed_is_the_last(tmp_path: Path) -> None:
    """Outputs of all lengths up to a draft's, and sequences that fill the context to its end."""
    folder = tiny_checkpoint(tmp_path / "model")

    def load() -> list[GenerateRequest]:
        short = [request(str(n), [5, 6, 5, 6], n) for n in range(1, 12)]
        return [*short, *(request(f"full{n}", [5, 6, 7] * 6, 1000) for n in range(3))]

    both(folder, load, block_size=4, max_batched_tokens=128, max_model_len=64)


def test_deterministic_bits_are_the_same(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model")
    options = {"block_size": 8, "max_batched_tokens": 128, "max_model_len": 128, "dtype": "bfloat16"}
    both(folder, load_of(6, KINDS, output=24), deterministic=True, **options)


@pytest.mark.parametrize("at", [{12}, {9, 30}])
def test_who_rejoins_in_the_middle_of_drafts_goes_on_with_the_same_tokens(tmp_path: Path, at: set[int]) -> None:
    folder = tiny_checkpoint(tmp_path / "model")
    load = load_of(10, KINDS)
    options = {"block_size": 8, "max_batched_tokens": 128, "max_num_seqs": 6, "prefix_cache": True}
    plain, drafting = Engine(folder, **options), Watched(folder, **options)
    expected, worker, number = plain.generate(load()), drafting.executor.workers[0], 0
    tokens: dict[str, list[int]] = {name: [] for name in expected}
    for r in load():
        drafting.core.add(r)
    while drafting.core.has_work:
        number += 1
        for delta in drafting.core.step().deltas:
            assert delta.index == len(tokens[delta.id])
            tokens[delta.id] += delta.token_ids
        if number in at:
            assert any(step.speculate for step in drafting.steps[-2:]), "drafts are in flight"
            drafting.executor._pending.clear()
            drafting.executor._threads[0].submit(lambda: None).result(60)  # what was submitted has run
            worker.leave()
            worker.rejoined()
            drafting.core.restart(drafting.core.scheduler.epoch + 1, drafting.core.capacity)
    assert tokens == expected
    plain.close()
    drafting.close()


@pytest.mark.parametrize("edits", [{}, {"min_p": 0.1}, {"top_p": 0.5}, {"logprobs": 0}, {"min_tokens": 3}])
@pytest.mark.parametrize("top_k", [0, 1, MAX_CANDIDATES, MAX_CANDIDATES + 1])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_scheduler_and_ranks_agree_on_who_needs_the_host(edits: dict, top_k: int, temperature: float) -> None:  # type: ignore[type-arg]
    for more in ({}, {"presence_penalty": 1.0}, {"repetition_penalty": 1.1}, {"logit_bias": {1: 1.0}}):
        params = SamplingParams(temperature=temperature, top_k=top_k, **edits, **more)
        row = row_params(request("a", [1], 5, params))
        assert row.can_speculate == kind_of([row]).in_graph, row


def test_what_the_ring_holds_of_a_speculative_pass() -> None:
    ring = np.array([5, 6, SKIPPED, 7, -1, SKIPPED, 8, 9, 10, 99], np.int32)
    tokens, counts, bad = accepted(ring, 3, 2)
    assert (tokens.tolist(), counts.tolist(), bad) == ([5, 6, 7, -1, 8, 9, 10], [2, 2, 3], (1,))
    assert ints(counts.tobytes()).tolist() == [2, 2, 3]


class Graph:
    """Stands for a CUDAGraph, and knows what it is of."""

    def __init__(self, key: object, replayed: list[object]) -> None:
        self.replay = lambda: replayed.append(key)


def test_a_pass_of_each_bucket_kind_and_length_is_captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    captured: list[int] = []
    replayed: list[object] = []

    def capture(graphs: object, width: int, run: object) -> tuple[Graph, None]:
        captured.append(width)
        return Graph(len(captured), replayed), None

    monkeypatch.setattr(drafts, "capture", capture)
    decode: Any = SimpleNamespace(width=4)
    passes = DraftGraphs(SimpleNamespace(), decode, enabled=True)  # type: ignore[arg-type]
    sampled = SampleKind(candidates=True)
    for decode.width, kind, count in ((4, sampled, 7), (4, sampled, 7), (8, sampled, 7), (4, SampleKind(), 7)):
        passes.run(kind, count)
    assert captured == [4, 8, 4] and replayed == [1, 1, 2, 3]
    assert not passes.prepare(8, sampled, 7) and passes.prepare(8, sampled, 5)
    passes.forget()
    assert passes.prepare(8, sampled, 7)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", [{"dtype": "float32"}, {"dtype": "bfloat16", "deterministic": True}])
def test_graphs_give_the_same_tokens_on_a_gpu(mode: dict[str, Any]) -> None:
    """As many rows as may speculate and some more, coming and going, greedy and sampled."""
    asked = [
        "Copy this text: the small brown dog ran over the hill.",
        "Count to twenty.",
        "Tell me a story about a boat.",
    ]
    found: list[list[list[int]]] = []
    accepted_tokens = 0

    def note(stats: StepStats) -> None:
        nonlocal accepted_tokens
        accepted_tokens += stats.accepted_tokens

    for speculation in ("off", "ngram"):
        with LLM(device="cuda", speculation=speculation, max_num_seqs=24, num_kv_blocks=400, **mode) as llm:
            llm._engine.on_stats = note
            answers: list[list[int]] = []
            for count in (1, 3, 8, 20):
                for params in (
                    SamplingParams(temperature=0.0, max_tokens=60),
                    SamplingParams(top_k=20, seed=4, max_tokens=60),
                ):
                    answers += [o.token_ids for o in llm.generate([asked[i % 3] for i in range(count)], params)]
            found.append(answers)
    assert found[0] == found[1] and accepted_tokens > 0
