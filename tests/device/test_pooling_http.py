"""/v1/embeddings and /v1/rerank over tiny checkpoints in the Hub's format, equal to transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3ForCausalLM, Qwen3Model

from tests.device.local_app import with_app
from tests.text_fixture import write_tokenizer
from tests.tiny import tiny_checkpoint
from tpqwen.text.pooling import RerankPrompts
from tpqwen.text.tokenizer import Tokenizer

TEXTS = ["Hello world", "the quick brown fox " * 20, "日本 <|im_end|>", "x"]
SIZES = {"block_size": 8, "max_batched_tokens": 64, "max_model_len": 512, "max_num_seqs": 4}


def checkpoint(folder: Path, **overrides: Any) -> Path:
    write_tokenizer(folder)
    return tiny_checkpoint(folder, vocab_size=416, **overrides)


def as_embedding(folder: Path) -> Path:
    """As published: sentence-transformers' files, no head, names without `model.`, though the config says untied."""
    weights = load_file(folder / "model.safetensors")
    kept = {n.removeprefix("model."): w for n, w in weights.items() if n != "lm_head.weight"}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    (folder / "modules.json").write_text("[]")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_lasttoken": True}))
    return folder


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_equal_transformers(tmp_path: Path, tied: bool) -> None:
    folder = as_embedding(checkpoint(tmp_path / "model", tie_word_embeddings=tied))
    tokenizer = Tokenizer(folder)
    end = tokenizer.vocabulary.control["<|endoftext|>"]

    async def ask(client: httpx.AsyncClient) -> tuple[list[Any], dict[str, Any]]:
        answer = await client.post("/v1/embeddings", json={"input": TEXTS})
        assert answer.status_code == 200, answer.text
        short = await client.post("/v1/embeddings", json={"input": TEXTS[0], "dimensions": 16})
        models = (await client.get("/v1/models")).json()["data"][0]
        return [*answer.json()["data"], *short.json()["data"]], models["capabilities"]

    data, capabilities = with_app(folder, ask, **SIZES)
    assert capabilities["embeddings"] and not capabilities["chat"]
    model = Qwen3Model.from_pretrained(folder, dtype=torch.float32)
    for text, entry in zip([*TEXTS, TEXTS[0]], data, strict=True):
        ids = [*tokenizer.encode_plain(text), end]
        with torch.no_grad():
            hidden = model(torch.tensor([ids])).last_hidden_state[0, -1]
        expected = torch.nn.functional.normalize(hidden[: len(entry["embedding"])], dim=0)
        np.testing.assert_allclose(entry["embedding"], expected.numpy(), atol=1e-5)
    assert len(data[-1]["embedding"]) == 16


def test_rerank_scores_equal_transformers(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "Qwen3-Reranker-tiny")
    prompts = RerankPrompts(Tokenizer(folder))

    async def ask(client: httpx.AsyncClient) -> list[Any]:
        body = {"query": "Hello?", "documents": TEXTS, "instruction": "judge"}
        answer = await client.post("/v1/rerank", json=body)
        assert answer.status_code == 200, answer.text
        found: list[Any] = answer.json()["results"]
        return found

    results = with_app(folder, ask, **SIZES)
    assert sorted(r["index"] for r in results) == list(range(len(TEXTS)))
    scores = [r["relevance_score"] for r in results]
    assert scores == sorted(scores, reverse=True)
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for result in results:
        ids = prompts.ids("Hello?", TEXTS[result["index"]], "judge", SIZES["max_model_len"])
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1]
        yes, no = prompts.yes_no
        expected = torch.softmax(logits[[no, yes]], 0)[1].item()
        assert result["relevance_score"] == pytest.approx(expected, abs=1e-5)
