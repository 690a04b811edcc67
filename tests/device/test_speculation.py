"""Speculation through the whole engine on a CPU: token for token what ordinary steps give, and how much it accepts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from tests.device.test_generation import Engine, prompts, request
from tests.tiny import tiny_checkpoint
from tpqwen.request import GenerateRequest, SamplingParams
from tpqwen.scheduler.speculation import Speculation
from tpqwen.step import DRAFT_ROWS, StepInput

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
