"""/v1/embeddings and /v1/rerank over a fake engine: shapes, order, refusals."""

from __future__ import annotations

import base64
import math

import numpy as np
import openai
import pytest

from tests.http.driver import CHAT, HELLO, exchange, post
from tests.http.fake_engine import ids, make_server
from tests.http.serving import serving
from tests.http.test_errors import check_error
from tpqwen.api.pooled import score_of
from tpqwen.model.config import Task

EMBEDDINGS, RERANK = "/v1/embeddings", "/v1/rerank"


def test_embeddings_are_unit_vectors_of_prompts_with_the_end_token() -> None:
    server = make_server(task=Task.EMBED)
    end = ids("<|endoftext|>")
    body = post(server.app, EMBEDDINGS, input=["hi", "a<|im_end|>", "x<|endoftext|>"]).json()
    prompts = [r.prompt_ids for r in server.engine.requests]
    assert prompts[0] == ids("hi") + end
    plain = server.chat.model.encode_plain
    assert prompts[1:] == [plain("a<|im_end|>") + end, plain("x<|endoftext|>") + end]
    assert all(r.max_tokens == 0 and r.pooling is not None and r.end_ids == () for r in server.engine.requests)
    for entry, prompt in zip(body["data"], prompts, strict=True):
        raw = np.array([len(prompt), prompt[-1], 1, 1])
        assert entry["embedding"] == pytest.approx(list(raw / np.linalg.norm(raw)), abs=1e-6)
    assert body["usage"] == {"prompt_tokens": sum(map(len, prompts)), "total_tokens": sum(map(len, prompts))}


def test_fewer_dimensions_are_normalised_again_and_base64_is_float32() -> None:
    app = make_server(task=Task.EMBED).app
    whole = post(app, EMBEDDINGS, input=[[5, 6]], dimensions=2).json()["data"][0]["embedding"]
    assert math.hypot(*whole) == pytest.approx(1)
    text = post(app, EMBEDDINGS, input=[[5, 6]], dimensions=2, encoding_format="base64").json()["data"][0]["embedding"]
    assert np.frombuffer(base64.b64decode(text), "<f4").tolist() == pytest.approx(whole)


def test_official_client_gets_embeddings() -> None:
    with serving(make_server(task=Task.EMBED).app) as url, openai.OpenAI(base_url=url + "/v1", api_key="none") as api:
        answer = api.embeddings.create(model="qwen3-test", input=["a", "b"])
        assert [len(e.embedding) for e in answer.data] == [4, 4]


def test_rerank_asks_for_yes_or_no_and_sorts() -> None:
    server = make_server(task=Task.RERANK)
    documents = ["a<|im_end|>", "b", {"text": "c"}]
    body = post(server.app, RERANK, query="q", documents=documents).json()
    assert [r["index"] for r in body["results"]] == [0, 1, 2]
    assert body["results"][0]["relevance_score"] == pytest.approx(1 / (1 + math.exp(-1)))
    assert [r["document"]["text"] for r in body["results"]] == ["a<|im_end|>", "b", "c"]
    request = server.engine.requests[0]
    assert request.pooling is not None and request.pooling.ids == (7, 8)
    control = server.chat.vocabulary.control
    assert request.prompt_ids.count(control["<|im_end|>"]) == 2  # of the template; the document's own is text
    text = server.chat.model.decode(request.prompt_ids, skip_special_tokens=False)
    assert text.startswith("<|im_start|>system\nJudge whether the Document meets")
    assert "<Instruct>: Given a web search query, retrieve relevant passages" in text
    assert text.endswith(
        "<Query>: q\n<Document>: a<|im_end|><|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


def test_a_long_document_is_cut_within_the_prompt() -> None:
    server = make_server(task=Task.RERANK)
    assert post(server.app, RERANK, query="q", documents=["word " * 2000]).status_code == 200
    (request,) = server.engine.requests
    assert len(request.prompt_ids) == 512
    assert server.chat.model.decode(request.prompt_ids[-7:], skip_special_tokens=False).endswith("</think>\n\n")


def test_scores_are_sigmoids_of_the_difference() -> None:
    assert score_of(np.array([-1.0, -1.0], "<f4")) == 0.5
    assert score_of(np.array([-50.0, -0.1], "<f4")) < 1e-20


def test_only_the_right_model_answers() -> None:
    for task, path, body in (
        (Task.GENERATE, EMBEDDINGS, {"input": "x"}),
        (Task.GENERATE, RERANK, {"query": "x", "documents": ["y"]}),
        (Task.EMBED, RERANK, {"query": "x", "documents": ["y"]}),
        (Task.EMBED, CHAT, {"messages": HELLO}),
        (Task.RERANK, "/v1/responses", {"input": "x"}),
    ):
        server = make_server(task=task)
        error = check_error(post(server.app, path, **body), 404, "not_found")
        assert str(task) in error["message"]
        assert not server.engine.requests
        (model,) = exchange(server.app, "GET", "/v1/models").json()["data"]
        assert model["capabilities"]["completion"] is (task is Task.GENERATE)
        assert model["capabilities"]["embeddings"] is (task is Task.EMBED)


def test_too_long_inputs_name_their_field() -> None:
    check_error(
        post(make_server(task=Task.EMBED).app, EMBEDDINGS, input=[[5] * 600]), 400, "context_length_exceeded", "input"
    )
