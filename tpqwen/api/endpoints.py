"""Every endpoint, once: what its request holds, for the OpenAPI document, the pages and the tests."""

from __future__ import annotations

from dataclasses import dataclass

from tpqwen.api.fields import (
    CHAT,
    COMPLETIONS,
    COUNT_TOKENS,
    DETOKENIZE,
    EMBEDDINGS,
    MESSAGES,
    RERANK,
    RESPONSES,
    TOKENIZE,
    Field,
)


@dataclass(frozen=True)
class Endpoint:
    """fields: of the JSON body, none for a GET. kind: content type of the answer. path may hold {id}."""

    method: str
    path: str
    summary: str
    fields: tuple[Field, ...] = ()
    kind: str = "application/json"
    streams: bool = False

    @property
    def name(self) -> str:
        """Its name in headings: the path without what all have in common."""
        return self.path.removeprefix("/v1/").strip("/").replace("/", " ") or "page"


ENDPOINTS = (
    Endpoint("POST", "/v1/chat/completions", "Answer a conversation", CHAT, streams=True),
    Endpoint("POST", "/v1/completions", "Continue a text", COMPLETIONS, streams=True),
    Endpoint("POST", "/v1/responses", "OpenAI's responses: the stateless core", RESPONSES, streams=True),
    Endpoint("POST", "/v1/messages", "Anthropic's messages", MESSAGES, streams=True),
    Endpoint("POST", "/v1/messages/count_tokens", "How many tokens a message's prompt has", COUNT_TOKENS),
    Endpoint("POST", "/v1/embeddings", "Embeddings, where a Qwen3-Embedding checkpoint is served", EMBEDDINGS),
    Endpoint("POST", "/v1/rerank", "Relevance scores, where a Qwen3-Reranker checkpoint is served", RERANK),
    Endpoint("POST", "/tokenize", "Token ids of a text or of a rendered conversation", TOKENIZE),
    Endpoint("POST", "/detokenize", "Text of token ids", DETOKENIZE),
    Endpoint("GET", "/v1/models", "What is served"),
    Endpoint("GET", "/v1/models/{id}", "One model: id, created, owned_by, max_model_len, capabilities"),
    Endpoint(
        "GET",
        "/v1/engine/events",
        "The engine once a second as server-sent events: slots, blocks, queue, step time, ranks",
        kind="text/event-stream",
    ),
    Endpoint("GET", "/health", "200 while this process lives, 503 when its engine is dead for good"),
    Endpoint("GET", "/ready", "200 only while new requests are taken, else 503; says why"),
    Endpoint(
        "GET",
        "/metrics",
        "Prometheus text of all replicas; ?scope=local for the one that answers",
        kind="text/plain",
    ),
    Endpoint("GET", "/version", "Versions of tpqwen, torch, ray, CUDA; model, tp"),
    Endpoint("GET", "/openapi.json", "This surface as an OpenAPI document"),
    Endpoint("GET", "/docs", "This surface as a page", kind="text/html"),
    Endpoint("GET", "/", "A page for people: chat, and the engine at work", kind="text/html"),
)
