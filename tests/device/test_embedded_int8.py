"""What int8 weights cost the embedded model: cross-entropy on text that it was not trained on, through the engine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.device.embedded_tools import MODEL, ROOT, tool
from tpqwen.config import Config
from tpqwen.offline import OfflineEngine
from tpqwen.request import SamplingParams

SCORED = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
ROW_TOKENS = 2047
ALLOWED = 0.01  # of the loss; measured 0.0001 on stories, 0.001 on answers, 0.002 on the licence


def held_out() -> dict[str, list[np.ndarray]]:
    """Rows of ids, the mark TARGET on those that count: stories, answers to unseen instances, and the licence, which is
    English of a kind that the model has hardly met."""
    corpus = tool("corpus")
    stories, answers = corpus.held_out_rows(corpus.Material(MODEL, None, 1))
    licence = tool("checkpoint").load_tokenizer(MODEL).encode((ROOT / "LICENSE").read_text(encoding="utf-8")).ids
    marked = np.array(licence[:ROW_TOKENS], dtype=np.uint16) | np.uint16(corpus.TARGET)
    return {"stories": list(stories[:2, :ROW_TOKENS]), "answers": list(answers[:3, :ROW_TOKENS]), "licence": [marked]}


def loss(engine: OfflineEngine, rows: list[np.ndarray]) -> float:
    """Mean negative log-probability of the marked tokens, nats."""
    mark = tool("corpus").TARGET
    asked = {(r := engine.request((row & (mark - 1)).tolist(), SCORED)).id: (r, row) for row in rows}
    found: list[float] = []
    for deltas in engine.run([request for request, _ in asked.values()]):
        for d in deltas:
            scores: list[Any] = d.prompt_logprobs or []
            found += [-s.logprob for s, i in zip(scores, asked[d.id][1][1:], strict=False) if i & mark]
    assert len(found) == sum(int(((row[1:] & mark) != 0).sum()) for row in rows)
    return float(np.mean(found))


def losses(quantization: str) -> dict[str, float]:
    options = {"device": "cpu", "threads": 1, "quantization": quantization, "prefix_cache": False}
    engine = OfflineEngine(Config.load(options, {}))
    try:
        return {name: loss(engine, rows) for name, rows in held_out().items()}
    finally:
        engine.close()


def test_int8_changes_the_loss_by_less_than_a_hundredth() -> None:
    exact, rounded = losses("none"), losses("int8")
    assert 0 < exact["answers"] < exact["stories"] < exact["licence"]
    for name, value in exact.items():
        assert rounded[name] == pytest.approx(value, rel=ALLOWED), name
        assert rounded[name] != value, "nothing was quantized"
