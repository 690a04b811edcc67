"""A rank that leaves its group and joins the next: steps in flight, broken steps and old slots leave no trace."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from tests.device.test_generation import Engine, prompts
from tests.device.test_guided import FORM, VOCAB, guide, request
from tests.text_fixture import write_tokenizer
from tests.tiny import tiny_checkpoint
from tpqwen.request import Delta, FinishReason, GenerateRequest, Pooling, SamplingParams

GREEDY, DRAWN = SamplingParams(temperature=0.0), SamplingParams(temperature=1.0, top_k=7)
PENALIZED = SamplingParams(temperature=1.0, frequency_penalty=0.7, repetition_penalty=1.2)
SCORED = SamplingParams(temperature=0.0, prompt_logprobs=2, logprobs=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tiny_checkpoint(tmp_path_factory.mktemp("rejoin"), vocab_size=VOCAB, initializer_range=0.1))


def requests() -> list[GenerateRequest]:
    kinds: list[dict[str, Any]] = [
        {"how": guide(FORM)},
        {"how": None, "params": GREEDY},
        {"how": None, "params": PENALIZED},
        {"how": None, "params": DRAWN},
        {"how": None, "params": SCORED},
    ]
    made = [request(f"r{i}", p, count=30, **kinds[i % 5]) for i, p in enumerate(prompts(15, 60, VOCAB - 48, seed=3))]
    alone = msgspec.structs.replace(made[1], id="pooled", max_tokens=0, pooling=Pooling())
    return [*made, alone]


class Interrupted(Engine):
    """Its rank leaves and rejoins after some steps, with whatever is in flight."""

    def run(self, at: set[int], broken: set[int]) -> dict[str, list[Delta]]:
        """at: numbers of steps. broken: numbers of sampling passes that end in the middle, which ends the group too."""
        worker, epoch = self.executor.workers[0], 0
        for r in requests():
            self.core.add(r)
        out: dict[str, list[Delta]] = {r.id: [] for r in requests()}
        sample, calls = worker.runner.sampler.sample, count(1)

        def sometimes(*given: Any) -> torch.Tensor:
            if next(calls) in broken:
                raise RuntimeError("Connection closed by peer")
            return sample(*given)

        worker.runner.sampler.sample = sometimes  # type: ignore[method-assign]
        for number in count(1):
            if not self.core.has_work:
                break
            try:
                deltas, lost = self.core.step().deltas, number in at
            except RuntimeError:
                deltas, lost = [], True
            if lost:
                epoch += 1
                self.executor._pending.clear()
                self.executor._threads[0].submit(lambda: None).result(60)  # what was submitted has run
                worker.leave()
                worker.rejoined()
                self.core.restart(epoch, self.core.capacity)
            for d in deltas:
                assert d.finish_reason is not FinishReason.ERROR, d.error
                out[d.id].append(d)
        assert epoch == len(at) + len(broken)
        return out


def tokens(deltas: list[Delta]) -> list[int]:
    assert [d.finish_reason is not None for d in deltas] == [False] * (len(deltas) - 1) + [True]
    return [t for d in deltas for t in d.token_ids]


@pytest.mark.parametrize(("at", "broken"), [({9}, set()), ({4, 31}, set()), (set(), {12}), ({25}, {7})])
def test_every_kind_of_row_goes_on_as_if_nothing_had_happened(folder: Path, at: set[int], broken: set[int]) -> None:
    sizes = {"max_num_seqs": 6, "max_batched_tokens": 32, "prefix_cache": True}
    engine = Interrupted(folder, **sizes)
    expected = engine.run(set(), set())
    engine.close()
    engine = Interrupted(folder, **sizes)
    got = engine.run(at, broken)
    engine.close()
    for name, deltas in expected.items():
        assert tokens(got[name]) == tokens(deltas), name
    scores = [[s.logprob for d in out["r4"] for s in d.prompt_logprobs or ()] for out in (expected, got)]
    assert scores[1] == pytest.approx(scores[0], abs=1e-4)
    assert sum(d.pooled is not None for d in got["pooled"]) == 1


def test_what_a_rank_has_computed_when_it_is_called_off_is_no_answer(folder: Path) -> None:
    engine = Engine(folder)
    worker = engine.executor.workers[0]
    submit = worker.submit

    def submit_and_be_called_off(step: Any) -> None:
        submit(step)
        worker._group.called_off = True

    worker.submit = submit_and_be_called_off  # type: ignore[method-assign]
    with pytest.raises(ConnectionError):
        engine.generate([requests()[1]])
