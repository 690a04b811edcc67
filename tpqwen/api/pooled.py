"""/v1/embeddings and /v1/rerank: numbers about prompts instead of text."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from tpqwen.api.answers import Frame, Usage
from tpqwen.api.calls import Call, check_model
from tpqwen.api.fields import EMBEDDINGS, RERANK, validate
from tpqwen.api.info import ModelInfo
from tpqwen.errors import RequestError
from tpqwen.request import Pooling
from tpqwen.text.pipeline import TextDelta
from tpqwen.text.pooling import INSTRUCTION
from tpqwen.text.work import EmbedWork, RerankWork, Work

_json = msgspec.json.encode


def read_embeddings(body: dict[str, Any], info: ModelInfo) -> Call:
    """Raises RequestError."""
    values = validate(EMBEDDINGS, body)
    check_model(values, info)
    if values.get("dimensions", 1) > info.hidden_size:
        message = f"dimensions: this model's embeddings have {info.hidden_size} numbers"
        raise RequestError(message, param="dimensions", code="out_of_range")
    return _call(EmbedWork(inputs=values["input"]), "input", Pooling(), values)


def read_rerank(body: dict[str, Any], info: ModelInfo) -> Call:
    """Raises RequestError."""
    values = validate(RERANK, body)
    check_model(values, info)
    texts = [d if isinstance(d, str) else d["text"] for d in values["documents"]]
    work = RerankWork(query=values["query"], documents=texts, instruction=values.get("instruction", INSTRUCTION))
    return _call(work, "documents", Pooling(info.yes_no), values)


def _call(work: Work, param: str, pooling: Pooling, values: dict[str, Any]) -> Call:
    return Call(
        work=work,
        param=param,
        sampling={"max_tokens": 0, "temperature": 0.0},
        truncate=values.get("truncate_prompt_tokens"),
        priority=values.get("priority", 0),
        cache_salt=values.get("cache_salt", ""),
        timeout_s=values.get("timeout"),
        pooling=pooling,
        options=values,
    )


class EmbeddingsAnswer:
    """OpenAI's list of embeddings. Implements answers.WholeAnswer."""

    def __init__(self, frame: Frame) -> None:
        self._frame = frame

    def body(self, deltas: Sequence[TextDelta], usage: Usage) -> bytes:
        options = self._frame.call.options
        vectors = [_unit(_numbers(d)[: options.get("dimensions")]) for d in deltas]
        as_text = options.get("encoding_format") == "base64"
        data = [
            {
                "object": "embedding",
                "index": i,
                "embedding": base64.b64encode(v.tobytes()).decode() if as_text else v.tolist(),
            }
            for i, v in enumerate(vectors)
        ]
        tokens = {"prompt_tokens": usage.prompt, "total_tokens": usage.prompt}
        return _json({"object": "list", "data": data, "model": self._frame.info.name, "usage": tokens})


class RerankAnswer:
    """Jina's and Cohere's results, the most relevant document first. Implements answers.WholeAnswer."""

    def __init__(self, frame: Frame) -> None:
        self._frame = frame

    def body(self, deltas: Sequence[TextDelta], usage: Usage) -> bytes:
        options = self._frame.call.options
        scores = [score_of(_numbers(d)) for d in deltas]
        order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[: options.get("top_n")]
        results: list[dict[str, Any]] = [{"index": i, "relevance_score": scores[i]} for i in order]
        if options.get("return_documents", True):
            for result in results:
                document = options["documents"][result["index"]]
                result["document"] = {"text": document} if isinstance(document, str) else document
        tokens = {"prompt_tokens": usage.prompt, "total_tokens": usage.prompt}
        identity = {"id": f"rerank-{self._frame.request_id}", "model": self._frame.info.name}
        return _json({**identity, "results": results, "usage": tokens})


def score_of(yes_no: NDArray[np.float32]) -> float:
    """P(yes) / (P(yes) + P(no)) from the two log-probabilities: the sigmoid of their difference."""
    return float(1.0 / (1.0 + np.exp(np.float64(yes_no[1]) - np.float64(yes_no[0]))))


def _numbers(delta: TextDelta) -> NDArray[np.float32]:
    assert delta.pooled is not None
    return np.frombuffer(delta.pooled, "<f4")


def _unit(vector: NDArray[np.float32]) -> NDArray[np.float32]:
    """Divided by its length; a zero vector stays."""
    length = float(np.linalg.norm(vector.astype(np.float64)))
    return (vector / length).astype("<f4") if length else vector
