"""logprobs, top_logprobs, prompt_logprobs and echo over HTTP, equal to transformers' log-softmax."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import Qwen3ForCausalLM

from tests.device.local_app import with_app
from tests.text_fixture import write_tokenizer
from tests.tiny import tiny_checkpoint
from tpqwen.text.tokenizer import Tokenizer

PROMPT = "the quick brown fox jumps over the lazy dog. Hello 日本"
SIZES = {"block_size": 8, "max_batched_tokens": 64, "max_model_len": 512, "max_num_seqs": 4, "dtype": "float32"}


class Expected:
    """transformers' log-probabilities of a token sequence, by place."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = Tokenizer(folder)
        self._model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self._num_ids = self.tokenizer.vocabulary.size

    def of(self, ids: list[int]) -> torch.Tensor:
        """[len(ids) - 1, V]: row i is the distribution of token i + 1. Ids that are no tokens are left out."""
        with torch.no_grad():
            logits = self._model(torch.tensor([ids])).logits[0, :-1, : self._num_ids]
        return torch.log_softmax(logits, -1)

    def token(self, token_id: int) -> str:
        raw = self.tokenizer.vocabulary.bytes_of(token_id)
        return raw.decode("utf-8", "replace")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write_tokenizer(tmp_path_factory.mktemp("model"))
    size = Tokenizer(made).vocabulary.size
    return tiny_checkpoint(made, vocab_size=size + 13, eos_token_id=size - 1)  # with padding rows


@pytest.fixture(scope="module")
def expected(folder: Path) -> Expected:
    return Expected(folder)


def asked(folder: Path, path: str, **body: Any) -> Any:
    async def ask(client: httpx.AsyncClient) -> Any:
        answer = await client.post(path, json={"temperature": 0, "max_tokens": 6, "return_token_ids": True, **body})
        assert answer.status_code == 200, answer.text
        return answer.json()

    return with_app(folder, ask, **SIZES)


def test_echo_with_logprobs(folder: Path, expected: Expected) -> None:
    (choice,) = asked(folder, "/v1/completions", prompt=PROMPT, echo=True, logprobs=3)["choices"]
    ids = [*choice["prompt_token_ids"], *choice["token_ids"]]
    table = expected.of(ids)
    scores = choice["logprobs"]
    assert len(scores["tokens"]) == len(ids)
    assert scores["token_logprobs"][0] is None
    for i, token_id in enumerate(ids[1:]):
        assert scores["token_logprobs"][i + 1] == pytest.approx(table[i, token_id].item(), abs=1e-4)
        best = table[i].topk(3)
        found = sorted(scores["top_logprobs"][i + 1].values(), reverse=True)[:3]
        assert found == pytest.approx(best.values.tolist(), abs=1e-4)


def test_prompt_logprobs_for_each_choice(folder: Path, expected: Expected) -> None:
    body = asked(folder, "/v1/completions", prompt=PROMPT, prompt_logprobs=2, n=3, temperature=1, seed=5)
    for choice in body["choices"]:
        ids = choice["prompt_token_ids"]
        table = expected.of(ids)
        assert choice["prompt_logprobs"][0] is None and len(choice["prompt_logprobs"]) == len(ids)
        for i, entries in enumerate(choice["prompt_logprobs"][1:]):
            assert {int(t) for t in entries} == {*table[i].topk(2).indices.tolist(), ids[i + 1]}
            for token_id, entry in entries.items():
                assert entry["logprob"] == pytest.approx(table[i, int(token_id)].item(), abs=1e-4)


def test_chat_logprobs(folder: Path, expected: Expected) -> None:
    messages = [{"role": "user", "content": PROMPT}]
    body = asked(folder, "/v1/chat/completions", messages=messages, logprobs=True, top_logprobs=4,
                 chat_template_kwargs={"enable_thinking": False}, skip_special_tokens=False)  # fmt: skip
    (choice,) = body["choices"]
    ids = [*body["prompt_token_ids"], *choice["token_ids"]]
    table = expected.of(ids)[len(body["prompt_token_ids"]) - 1 :]
    entries = choice["logprobs"]["content"]
    assert len(entries) == len(choice["token_ids"]) == 6
    for i, (entry, token_id) in enumerate(zip(entries, choice["token_ids"], strict=True)):
        assert entry["token"] == expected.token(token_id)
        assert entry["logprob"] == pytest.approx(table[i, token_id].item(), abs=1e-4)
        best = table[i].topk(4)
        assert [t["token"] for t in entry["top_logprobs"]] == [expected.token(t) for t in best.indices.tolist()]
        assert [t["logprob"] for t in entry["top_logprobs"]] == pytest.approx(best.values.tolist(), abs=1e-4)
