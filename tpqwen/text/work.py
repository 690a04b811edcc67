"""What has to be rendered and tokenized for a request, as messages: it may be done here or in another process."""

from __future__ import annotations

import asyncio
from functools import cached_property
from typing import Any, Protocol

import msgspec
import numpy as np

from tpqwen.request import ThinkingBudget
from tpqwen.text.chat import ChatFormat, Thinking
from tpqwen.text.pooling import RerankPrompts, embedding_ids
from tpqwen.text.thinking import State


class ChatWork(msgspec.Struct, frozen=True, kw_only=True, tag="chat"):
    """A conversation. continue_final_message: the answer goes on where the last message ends."""

    messages: list[Any]
    thinking: Thinking = msgspec.field(default_factory=Thinking)
    tools: list[Any] = []  # definitions that the template shows
    add_generation_prompt: bool = True
    continue_final_message: bool = False


class PromptWork(msgspec.Struct, frozen=True, kw_only=True, tag="prompt"):
    """Plain prompts; control tokens written in them count as such."""

    prompts: list[str | list[int]]


class EmbedWork(msgspec.Struct, frozen=True, kw_only=True, tag="embed"):
    """Inputs of an embedding model."""

    inputs: list[str | list[int]]


class RerankWork(msgspec.Struct, frozen=True, kw_only=True, tag="rerank"):
    """A query and the documents that may answer it."""

    query: str
    documents: list[str]
    instruction: str


Work = ChatWork | PromptWork | EmbedWork | RerankWork


class Rendered(msgspec.Struct, frozen=True, kw_only=True):
    """ids: of each prompt, a list or int32 bytes; none at all when one is longer than the context. longest: tokens of
    that one.

    start, thinking and budget: see text.chat.ChatPrompt; None for plain prompts.
    """

    ids: list[list[int] | bytes]
    longest: int
    start: State | None = None
    thinking: bool | None = None
    budget: ThinkingBudget | None = None

    @property
    def prompts(self) -> list[list[int]]:
        return [np.frombuffer(ids, "<i4").tolist() if isinstance(ids, bytes) else ids for ids in self.ids]

    def packed(self) -> Rendered:
        """The same for a pipe: a million ids are read from bytes at once."""
        return msgspec.structs.replace(self, ids=[np.asarray(ids, "<i4").tobytes() for ids in self.prompts])


def size_of(work: Work) -> int:
    """Characters and ids in it, roughly; strings deep inside of messages included."""
    if isinstance(work, ChatWork):
        return _text_size(work.messages) + _text_size(work.tools)
    if isinstance(work, RerankWork):
        return len(work.documents) * (len(work.query) + len(work.instruction)) + sum(map(len, work.documents))
    return sum(map(len, work.prompts if isinstance(work, PromptWork) else work.inputs))


def _text_size(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_text_size, value.values()))
    return sum(map(_text_size, value)) if isinstance(value, list) else 1


class Renderer:
    """Does the work. max_len: longest prompt that is given back, tokens; a longer one is only counted."""

    def __init__(self, chat: ChatFormat, max_len: int) -> None:
        self._chat = chat
        self._max_len = max_len

    @cached_property
    def _rerank(self) -> RerankPrompts:
        return RerankPrompts(self._chat.model)

    def run(self, work: Work, truncate: int | None = None, limited: bool = True) -> Rendered:
        """truncate: keep the last so many tokens of each prompt. limited False: any length. Raises RequestError."""
        model = self._chat.model
        start = thinking = budget = None
        if isinstance(work, ChatWork):
            prompt = self._chat.prompt(
                work.messages,
                work.thinking,
                work.tools,
                add_generation_prompt=work.add_generation_prompt,
                continue_final_message=work.continue_final_message,
            )
            prompts, start, thinking, budget = [prompt.ids], prompt.start, prompt.thinking, prompt.budget
        elif isinstance(work, PromptWork):
            prompts = [model.encode(p) if isinstance(p, str) else p for p in work.prompts]
        elif isinstance(work, EmbedWork):
            prompts = [embedding_ids(model, text) for text in work.inputs]
        else:
            make = self._rerank.ids
            prompts = [make(work.query, d, work.instruction, self._max_len) for d in work.documents]
        if truncate is not None:
            prompts = [ids[-truncate:] for ids in prompts]
        longest = max(map(len, prompts), default=0)
        if limited and longest > self._max_len:
            prompts = []
        return Rendered(ids=[*prompts], longest=longest, start=start, thinking=thinking, budget=budget)


class TextService(Protocol):
    """Where an event loop has its text work done."""

    async def render(self, work: Work, truncate: int | None = None, limited: bool = True) -> Rendered:
        """Renderer.run, without holding the loop up. Raises RequestError."""


class ThreadText:
    """In threads of this process: no time limit, and long work shares the interpreter. For tests and small servers."""

    def __init__(self, chat: ChatFormat, max_len: int) -> None:
        self._renderer = Renderer(chat, max_len)

    async def render(self, work: Work, truncate: int | None = None, limited: bool = True) -> Rendered:
        return await asyncio.to_thread(self._renderer.run, work, truncate, limited)
