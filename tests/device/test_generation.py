"""The whole engine against transformers on the same weights: TP, chunks, prefix hits, preemption, any batch."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import torch
from transformers import Qwen3ForCausalLM

from tests.ranks_in_threads import ThreadedExecutor
from tests.tiny import tiny_checkpoint
from tpqwen.config import Config
from tpqwen.engine.core import EngineCore
from tpqwen.request import FinishReason, GenerateRequest, SamplingParams

SHAPES = {
    "tied_group1": {"tie_word_embeddings": True, "num_attention_heads": 4, "num_key_value_heads": 4},
    "untied_group2": {"tie_word_embeddings": False, "num_attention_heads": 4, "num_key_value_heads": 2},
    "tied_group4": {"tie_word_embeddings": True, "num_attention_heads": 8, "num_key_value_heads": 2},
    "untied_group8": {"tie_word_embeddings": False, "num_attention_heads": 8, "num_key_value_heads": 1},
}
GREEDY = SamplingParams(temperature=0.0)


class Engine:
    """EngineCore over ranks in threads, driven to the end of each batch."""

    def __init__(self, folder: Path, *, prefix_cache: bool = False, **options: object) -> None:
        config = Config.load({"device": "cpu", "threads": 1, **options}, {})
        self.executor = ThreadedExecutor(config, folder)
        capacity = self.executor.start()
        self.core = EngineCore(self.executor, capacity, schedule=config.schedule, prefix_cache=prefix_cache)
        self.preemptions = 0
        self.cached: dict[str, int] = {}

    def generate(self, requests: list[GenerateRequest]) -> dict[str, list[int]]:
        for r in requests:
            self.core.add(r)
        outputs: dict[str, list[int]] = {r.id: [] for r in requests}
        unfinished = set(outputs)
        while unfinished:
            result = self.core.step()
            if result.stats is not None:
                self.preemptions += result.stats.preemptions
            for d in result.deltas:
                assert d.index == len(outputs[d.id])
                assert d.finish_reason is not FinishReason.ERROR, d.error
                outputs[d.id] += d.token_ids
                if d.cached_tokens is not None:
                    self.cached[d.id] = d.cached_tokens
                if d.finish_reason:
                    unfinished.remove(d.id)
        return outputs

    def close(self) -> None:
        self.executor.stop()


def request(
    name: str, prompt: list[int], count: int, params: SamplingParams = GREEDY, seed: int = 0
) -> GenerateRequest:
    return GenerateRequest(id=name, prompt_ids=prompt, params=params, max_tokens=count, seed=seed)


def prompts(count: int, longest: int, vocab: int, seed: int = 0) -> list[list[int]]:
    random = Random(seed)
    return [[random.randrange(vocab) for _ in range(random.randint(1, longest))] for _ in range(count)]


def reference(folder: Path, prompt: list[int], count: int) -> list[int]:
    """transformers' greedy tokens, end tokens ignored."""
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    out = model.generate(
        torch.tensor([prompt]), max_new_tokens=count, min_new_tokens=count, do_sample=False, eos_token_id=None
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_200_greedy_tokens_equal_transformers(tmp_path: Path, shape: str, tp: int) -> None:
    """Prompts longer than a chunk, six at once, a pool so small that some are preempted."""
    folder = tiny_checkpoint(tmp_path / "model", **SHAPES[shape])
    engine = Engine(
        folder, tp=tp, block_size=8, max_batched_tokens=16, max_num_seqs=6, num_kv_blocks=40, max_model_len=512
    )
    inputs = prompts(6, 40, 300, seed=tp)
    outputs = engine.generate([request(str(i), p, 200 if i == 0 else 60) for i, p in enumerate(inputs)])
    engine.close()
    assert engine.preemptions > 0, "the pool was meant to be too small"
    for i in (0, 3, 5):
        assert outputs[str(i)] == reference(folder, inputs[i], len(outputs[str(i)])), (shape, tp, i)


@pytest.mark.parametrize("tp", [1, 2])
def test_prefix_hits_change_nothing(tmp_path: Path, tp: int) -> None:
    folder = tiny_checkpoint(tmp_path / "model", **SHAPES["untied_group2"])
    engine = Engine(folder, prefix_cache=True, tp=tp, block_size=8, max_batched_tokens=32, max_model_len=512)
    shared = prompts(1, 50, 300)[0] * 3
    first = engine.generate([request("a", [*shared, 1, 2, 3], 30)])["a"]
    again = engine.generate([request("b", [*shared, 1, 2, 3], 30), request("c", [*shared, 9, 9], 30)])
    engine.close()
    assert engine.cached["b"] >= len(shared) // 8 * 8 - 8
    assert again["b"] == first
    assert again["c"] == reference(folder, [*shared, 9, 9], 30)


def test_seeded_sampling_is_the_same_alone_in_a_crowd_preempted_and_for_any_tp(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model", **SHAPES["tied_group4"])
    kinds = [
        SamplingParams(temperature=0.8),
        SamplingParams(temperature=0.7, top_k=20, top_p=0.9),
        SamplingParams(temperature=1.0, top_p=0.8),
        SamplingParams(temperature=0.9, presence_penalty=0.5, frequency_penalty=0.2, repetition_penalty=1.2),
        SamplingParams(temperature=0.6, min_p=0.05, logit_bias={5: 2.0}),
    ]
    inputs = prompts(20, 30, 300, seed=3)

    def load(names: range) -> list[GenerateRequest]:
        return [request(str(i), inputs[i], 40, kinds[i % len(kinds)], seed=1000 + i) for i in names]

    roomy = {"block_size": 8, "max_batched_tokens": 64, "max_model_len": 128}
    one, two = Engine(folder, tp=1, **roomy), Engine(folder, tp=2, **roomy)
    tight = Engine(folder, tp=1, **(roomy | {"num_kv_blocks": 30}))
    crowd = one.generate(load(range(20)))
    squeezed = tight.generate(load(range(20)))
    assert tight.preemptions > 0
    alone: dict[str, list[int]] = {}
    for i in range(5):
        alone |= one.generate(load(range(i, i + 1)))
    other = two.generate(load(range(20)))
    for e in (one, two, tight):
        e.close()
    assert crowd == other
    assert crowd == squeezed
    assert all(alone[n] == crowd[n] for n in alone)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_pipeline_depth_changes_nothing(tmp_path: Path, depth: int) -> None:
    folder = tiny_checkpoint(tmp_path / "model", **SHAPES["untied_group2"])
    inputs = prompts(8, 30, 300, seed=4)
    engine = Engine(folder, depth=depth, block_size=8, max_batched_tokens=16, max_model_len=256)
    outputs = engine.generate([request(str(i), p, 25) for i, p in enumerate(inputs)])
    engine.close()
    assert outputs["2"] == reference(folder, inputs[2], 25)
    assert outputs["7"] == reference(folder, inputs[7], 25)


def test_logprobs_equal_transformers(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model", **SHAPES["tied_group4"])
    engine = Engine(folder, tp=2, block_size=8, max_model_len=128)
    prompt = prompts(1, 20, 300, seed=6)[0]
    engine.core.add(request("x", prompt, 10, SamplingParams(temperature=0.0, logprobs=3)))
    tokens, logprobs = [], []
    while engine.core.has_work:
        for d in engine.core.step().deltas:
            tokens += d.token_ids
            logprobs += d.logprobs or []
    engine.close()
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    expected = torch.log_softmax(logits, -1)
    assert len(logprobs) == len(tokens) == 10
    for i, entry in enumerate(logprobs):
        assert entry.logprob == pytest.approx(expected[i, tokens[i]].item(), abs=1e-4)
        top = expected[i].topk(3)
        assert entry.top_ids == top.indices.tolist()
        assert entry.top_logprobs == pytest.approx(top.values.tolist(), abs=1e-4)
