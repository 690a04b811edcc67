"""Deterministic mode through the whole engine on a CPU: a request's tokens and log-probabilities, bit by bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.device.test_generation import Engine, prompts, request
from tests.tiny import tiny_checkpoint
from tpqwen.request import GenerateRequest, SamplingParams, TokenLogprob

KINDS = [
    SamplingParams(temperature=0.0, logprobs=3),
    SamplingParams(temperature=0.8, logprobs=2),
    SamplingParams(temperature=0.7, top_k=20, top_p=0.9, logprobs=0),
    SamplingParams(temperature=1.0, top_p=0.8, logprobs=1),
    SamplingParams(temperature=0.9, presence_penalty=0.5, repetition_penalty=1.2, logprobs=1),
]
INPUTS = prompts(21, 30, 300, seed=11)
ROOMY = {"block_size": 8, "max_batched_tokens": 64, "max_model_len": 128, "deterministic": True}
Answers = dict[str, list[tuple[int, TokenLogprob]]]


def requests(names: range) -> list[GenerateRequest]:
    return [request(str(i), INPUTS[i], 20, KINDS[i % len(KINDS)], seed=50 + i) for i in names]


def answers(engine: Engine, asked: list[GenerateRequest]) -> Answers:
    """Each token with its log-probabilities, whose equality is that of the logits they come from."""
    for r in asked:
        engine.core.add(r)
    found: Answers = {r.id: [] for r in asked}
    while engine.core.has_work:
        result = engine.core.step()
        engine.preemptions += result.stats.preemptions if result.stats is not None else 0
        for d in result.deltas:
            found[d.id] += zip(d.token_ids, d.logprobs or [], strict=True)
            if d.cached_tokens is not None:
                engine.cached[d.id] = d.cached_tokens
    return found


@pytest.mark.parametrize(
    ("dtype", "tp", "count", "few_blocks", "quantization"),
    [
        ("bfloat16", 1, 21, 30, "none"),
        ("bfloat16", 1, 12, 17, "none"),
        ("bfloat16", 4, 12, 17, "none"),
        ("float32", 2, 12, 17, "none"),
        ("float32", 1, 12, 17, "int8"),
    ],
)
def test_alone_in_a_crowd_in_small_chunks_and_preempted_give_the_same_bits(
    tmp_path: Path, dtype: str, tp: int, count: int, few_blocks: int, quantization: str
) -> None:
    folder = tiny_checkpoint(tmp_path / "model")
    options = ROOMY | {"dtype": dtype, "tp": tp, "quantization": quantization}
    others = ({}, {"num_kv_blocks": few_blocks}, {"max_batched_tokens": 24})
    engines = [Engine(folder, **(options | other)) for other in others]
    crowd, squeezed, in_pieces = (answers(e, requests(range(count))) for e in engines)
    assert engines[1].preemptions > 0, "the pool was meant to be too small"
    alone = {}
    for i in range(5):
        alone |= answers(engines[0], requests(range(i, i + 1)))
    for engine in engines:
        engine.close()
    assert all(len(answer) == 20 or answer[-1][0] in (1, 2) for answer in crowd.values())
    assert squeezed == crowd
    assert in_pieces == crowd
    assert alone == {name: crowd[name] for name in alone}


def test_a_prefix_hit_gives_the_same_bits(tmp_path: Path) -> None:
    engine = Engine(tiny_checkpoint(tmp_path / "model"), prefix_cache=True, dtype="bfloat16", **ROOMY)
    first = answers(engine, [request("a", INPUTS[0] * 3, 20, KINDS[0])])["a"]
    again = answers(engine, [request("b", INPUTS[0] * 3, 20, KINDS[0]), *requests(range(3, 8))])["b"]
    engine.close()
    assert engine.cached["b"] >= 8
    assert again == first
