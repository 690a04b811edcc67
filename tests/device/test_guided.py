"""Guided generation by the whole engine: valid output, equal for TP, in a crowd, preempted, after prefix hits."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import jsonschema
import msgspec
import numpy as np
import pytest
import torch
from transformers import Qwen3ForCausalLM

from tests.device.test_generation import Engine, prompts
from tests.text_fixture import tokenizer, write_tokenizer
from tests.tiny import tiny_checkpoint
from tpqwen.grammar import Vocabulary
from tpqwen.request import GenerateRequest, Guide, SamplingParams
from tpqwen.structure import Literal, Regex, Schema, Sequence, Structure
from tpqwen.text.schema import checked_schema

VOCAB = 448  # rows of the head; the tokenizer has fewer tokens
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "kind": {"enum": ["red", "green", 7, None]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
        "sub": {"type": "object", "properties": {"x": {"type": "integer", "minimum": -5, "maximum": 120}}},
    },
    "required": ["name", "kind", "tags"],
    "additionalProperties": False,
}
FORM = Schema(checked_schema(SCHEMA, "schema"))
CONTROL = tokenizer().vocabulary.control
END = CONTROL["<|im_end|>"]
CALL = Sequence((Literal('\n{"name": "f", "arguments": '), Schema('{"type": "object"}'), Literal("}\n")))
SAMPLED = SamplingParams(temperature=1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tiny_checkpoint(tmp_path_factory.mktemp("guided"), vocab_size=VOCAB, initializer_range=0.1))


@cache
def vocabulary() -> Vocabulary:
    return Vocabulary(write_tokenizer(Path(mkdtemp(prefix="tpqwen-vocabulary-"))), VOCAB)


def guide(answer: Structure | None = None, **fields: Any) -> Guide:
    compiled = vocabulary().compile(answer) if answer is not None else b""
    return Guide(answer=compiled, end_ids=(END,), **fields)


def request(name: str, prompt: list[int], how: Guide | None, count: int = 80, **changes: Any) -> GenerateRequest:
    params = changes.pop("params", SAMPLED)
    return GenerateRequest(
        id=name, prompt_ids=prompt, params=params, max_tokens=count, seed=7, end_ids=(END,), guide=how, **changes
    )


def text(tokens: list[int]) -> str:
    return tokenizer().decode(tokens, skip_special_tokens=False)


def check(tokens: list[int]) -> None:
    assert tokens[-1] == END, text(tokens)
    jsonschema.validate(json.loads(text(tokens[:-1])), SCHEMA)


def test_output_is_valid_and_equal_for_tp_in_a_crowd_preempted_and_after_prefix_hits(folder: Path) -> None:
    how = guide(FORM)
    inputs = prompts(8, 30, 300, seed=5)

    def load(names: range) -> list[GenerateRequest]:
        return [request(str(i), inputs[i], how if i % 2 == 0 else None, 90) for i in names]

    roomy: dict[str, Any] = {"block_size": 8, "max_batched_tokens": 32, "max_model_len": 256}
    one, two = Engine(folder, tp=1, **roomy), Engine(folder, tp=2, prefix_cache=True, **roomy)
    tight = Engine(folder, tp=1, num_kv_blocks=30, **roomy)
    crowd = one.generate(load(range(8)))
    for i in range(0, 8, 2):
        check(crowd[str(i)])
    assert two.generate(load(range(8))) == crowd
    assert two.generate(load(range(8))) == crowd
    assert any(two.cached.values())
    assert tight.generate(load(range(8))) == crowd
    assert tight.preemptions > 0
    assert {k: v for i in range(8) for k, v in one.generate(load(range(i, i + 1))).items()} == crowd
    plain = one.generate([request(str(i), inputs[i], None, 90) for i in range(1, 8, 2)])
    assert all(plain[k] == crowd[k] for k in plain), "guided neighbours changed a free row"
    for e in (one, two, tight):
        e.close()


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_greedy_tokens_equal_transformers_under_the_same_masks(folder: Path, depth: int) -> None:
    how = guide(FORM)
    prompt = prompts(1, 20, 300, seed=9)[0]
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    matcher = vocabulary().matcher(how.answer, (END,))
    expected: list[int] = []
    while len(expected) < 40 and END not in expected:
        mask = np.zeros((1, vocabulary().num_words), np.int32)
        matcher.fill(mask, 0)
        allowed = np.unpackbits(mask.view(np.uint8), bitorder="little")[:VOCAB].astype(bool)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + expected])).logits[0, -1]
        expected.append(int(logits.masked_fill(~torch.from_numpy(allowed), -torch.inf).argmax()))
        assert matcher.take(expected[-1])
    engine = Engine(folder, tp=2, depth=depth, block_size=8, max_model_len=128)
    found = engine.generate([request("a", prompt, how, 40, params=SamplingParams(temperature=0.0))])["a"]
    engine.close()
    assert found == expected


def test_every_kind_of_sampling_keeps_to_the_form(folder: Path) -> None:
    how = guide(FORM)
    quote = tokenizer().encode('"')[0]
    kinds = [
        SamplingParams(temperature=0.8, top_k=20, top_p=0.9),
        SamplingParams(temperature=1.0, top_p=0.8),
        SamplingParams(temperature=0.9, presence_penalty=0.5, repetition_penalty=1.2),
        SamplingParams(temperature=1.0, logit_bias={END: 100.0, quote: -50.0}),
        SamplingParams(temperature=1.0, min_p=0.05, logprobs=2),
        SamplingParams(temperature=0.0),
    ]
    inputs = prompts(len(kinds), 20, 300, seed=2)
    engine = Engine(folder, tp=2, block_size=8, max_model_len=256)
    found = engine.generate([request(str(i), inputs[i], how, 150, params=k) for i, k in enumerate(kinds)])
    engine.close()
    for tokens in found.values():
        if tokens[-1] == END:
            check(tokens)
        else:
            assert len(tokens) == 150
    assert sum(t[-1] == END for t in found.values()) >= 4


def test_min_tokens_gives_way_only_where_nothing_else_is_allowed(folder: Path) -> None:
    engine = Engine(folder, tp=1, block_size=8, max_model_len=128)
    params = SamplingParams(temperature=1.0, min_tokens=20, logit_bias={END: 100.0})
    guides = {"short": Regex("[ab]{1,3}"), "long": Regex("[ab]{1,60}")}
    found = engine.generate(
        [
            request(name, [5, 6], guide(s, min_tokens=20, forbidden_ids=(END,)), 60, params=params)
            for name, s in guides.items()
        ]
    )
    engine.close()
    assert 1 <= len(text(found["short"][:-1])) <= 3
    assert found["short"][-1] == END
    assert len(found["long"]) == 21


def test_calls_are_forced_after_the_thinking_and_bound_by_their_grammar(folder: Path) -> None:
    marks = {
        "call_open": CONTROL["<tool_call>"],
        "call_close": CONTROL["</tool_call>"],
        "think_open": CONTROL["<think>"],
        "think_close": CONTROL["</think>"],
        "newline_id": tokenizer().encode("\n")[0],
    }
    body = vocabulary().compile(
        Sequence((Literal('\n{"name": "f", "arguments": '), Literal('{"x": 1}'), Literal("}\n")))
    )
    engine = Engine(folder, tp=2, block_size=8, max_model_len=256)
    once = Guide(call=body, calls=1, parallel=False, end_ids=(END,), inside=True, **marks)
    bias = SamplingParams(temperature=1.0, logit_bias={marks["think_close"]: 12.0})
    found = engine.generate([request("once", [3, 4], once, 200, params=bias)])["once"]
    close = found.index(marks["think_close"])
    assert END not in found[:close]
    assert text(found[close + 1 :]) == '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call><|im_end|>'
    many = msgspec.structs.replace(once, parallel=True, inside=False)
    eager = SamplingParams(temperature=1.0, logit_bias={END: -100.0})
    found = engine.generate([request("many", [3, 4], many, 100, params=eager)])["many"]
    engine.close()
    calls = text(found).replace("</tool_call><tool_call>", "</tool_call>\n<tool_call>").split("</tool_call>\n")
    assert len(calls) > 2
    assert {c.strip("\n") for c in calls[:-1]} == {'<tool_call>\n{"name": "f", "arguments": {"x": 1}}'}
