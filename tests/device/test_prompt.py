"""What a prompt tells without output: log-probabilities of its tokens, pooled values; against transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen3ForCausalLM

from tests.device.test_generation import SHAPES, Engine, prompts
from tests.tiny import tiny_checkpoint
from tpqwen.request import Delta, FinishReason, GenerateRequest, Pooling, SamplingParams

SCORED = SamplingParams(temperature=0.0, prompt_logprobs=3)


def run(engine: Engine, requests: list[GenerateRequest]) -> dict[str, list[Delta]]:
    for r in requests:
        engine.core.add(r)
    deltas: dict[str, list[Delta]] = {r.id: [] for r in requests}
    while engine.core.has_work:
        result = engine.core.step()
        if result.stats is not None:
            engine.preemptions += result.stats.preemptions
        for d in result.deltas:
            deltas[d.id].append(d)
    return deltas


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"), **SHAPES["untied_group2"])


@pytest.fixture(scope="module")
def model(folder: Path) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)


def check_scores(model: Qwen3ForCausalLM, prompt: list[int], delta: Delta) -> None:
    with torch.no_grad():
        expected = torch.log_softmax(model(torch.tensor([prompt])).logits[0], -1)
    scores = delta.prompt_logprobs
    assert scores is not None and len(scores) == len(prompt) - 1
    for i, score in enumerate(scores):
        top = expected[i].topk(3)
        assert score.logprob == pytest.approx(expected[i, prompt[i + 1]].item(), abs=1e-4)
        assert score.top_ids == top.indices.tolist()
        assert score.top_logprobs == pytest.approx(top.values.tolist(), abs=1e-4)


@pytest.mark.parametrize("tp", [1, 2])
def test_prompt_logprobs_equal_transformers_over_chunks_hits_and_preemption(
    folder: Path, model: Qwen3ForCausalLM, tp: int
) -> None:
    engine = Engine(
        folder, tp=tp, prefix_cache=True, block_size=8, max_batched_tokens=80, num_kv_blocks=40, max_model_len=256
    )
    inputs = [prompts(1, 150, 300, seed=s)[0] * 2 for s in (1, 2, 3)]
    inputs = [p[:120] for p in inputs] + [[7]]

    def load(name: str) -> list[GenerateRequest]:
        return [
            GenerateRequest(id=f"{name}{i}", prompt_ids=p, params=SCORED, max_tokens=60, seed=0)
            for i, p in enumerate(inputs)
        ]

    first = run(engine, load("a"))
    again = run(engine, load("b"))
    engine.close()
    assert engine.preemptions > 0
    for deltas in (first, again):
        for prompt, of_one in zip(inputs[:3], list(deltas.values())[:3], strict=True):
            check_scores(model, prompt, of_one[0])
            assert all(d.prompt_logprobs is None for d in of_one[1:])
    assert first["a3"][0].prompt_logprobs is None
    assert [d.token_ids for d in first["a0"]] == [d.token_ids for d in again["b0"]]


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_pooled_values_equal_transformers_beside_ordinary_requests(
    folder: Path, model: Qwen3ForCausalLM, tp: int
) -> None:
    engine = Engine(folder, tp=tp, block_size=8, max_batched_tokens=32, max_model_len=128)
    inputs = [*prompts(5, 60, 300, seed=8), prompts(1, 1, 300)[0] * 128]
    kinds = [Pooling(), Pooling((5, 9)), None, Pooling((300,)), Pooling(), Pooling()]
    requests = [
        GenerateRequest(
            id=str(i), prompt_ids=p, params=SamplingParams(temperature=0.0), max_tokens=0 if k else 4, seed=0, pooling=k
        )
        for i, (p, k) in enumerate(zip(inputs, kinds, strict=True))
    ]
    deltas = run(engine, requests)
    engine.close()
    for i, (prompt, kind) in enumerate(zip(inputs, kinds, strict=True)):
        last = deltas[str(i)][-1]
        if kind is None:
            assert sum(len(d.token_ids) for d in deltas[str(i)]) == 4 and last.pooled is None
            continue
        assert (len(deltas[str(i)]), last.token_ids, last.finish_reason) == (1, [], FinishReason.LENGTH)
        with torch.no_grad():
            out = model(torch.tensor([prompt]), output_hidden_states=True)
        expected = (
            torch.log_softmax(out.logits[0, -1], -1)[list(kind.ids)] if kind.ids else out.hidden_states[-1][0, -1]
        )
        assert last.pooled is not None
        np.testing.assert_allclose(np.frombuffer(last.pooled, "<f4"), expected.numpy(), atol=2e-4)
