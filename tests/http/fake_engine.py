"""An Engine with scripted answers, and the app over it: HTTP tests need no weights, no ranks, no sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.text_fixture import tokenizer
from tpqwen.api.access import Access
from tpqwen.api.app import Elsewhere, build_app
from tpqwen.api.hooks import FinishedSequence
from tpqwen.api.info import ApiSettings, ModelInfo
from tpqwen.engine.protocol import EngineState, Work
from tpqwen.model.config import Task
from tpqwen.readings import RankLoad
from tpqwen.request import Delta, FinishReason, GenerateRequest, TokenLogprob
from tpqwen.step import Capacity, Snapshot
from tpqwen.structure import Compiler
from tpqwen.text.chat import ChatFormat, GenerationDefaults
from tpqwen.text.sequences import Limits
from tpqwen.text.work import TextService, ThreadText

MAX_MODEL_LEN = 512
CAPACITY = Capacity(num_blocks=64, block_size=16, max_num_seqs=8, max_model_len=MAX_MODEL_LEN, max_batched_tokens=64)


def ids(text: str, variant: str = "hybrid") -> list[int]:
    """Ids of a scripted text; control tokens in it count as such."""
    return tokenizer(variant).encode(text)


@dataclass
class FakeEngine:
    """Answers every request with the tokens of `script(request)`, one delta each, at most max_tokens of them.

    A script item may be an exception (raised at that place), an int (a token), a list (several tokens in one delta), a
    float (seconds of sleep) or a Delta (sent as it is). When the script is used up the end token follows.
    """

    script: Callable[[GenerateRequest], list[Any]] = field(default=lambda request: ids("Hello world"))
    end_id: int = field(default_factory=lambda: ids("<|im_end|>")[0])
    current: EngineState = field(default_factory=lambda: EngineState("ready"))
    requests: list[GenerateRequest] = field(default_factory=list)
    live: set[str] = field(default_factory=set)
    produced: int = 0
    snapshot: Snapshot | None = None  # what whoever looks is shown
    looks: int = 0
    work: Work = field(default_factory=Work)

    capacity = CAPACITY

    @property
    def state(self) -> EngineState:
        return self.current

    def check_room(self) -> None:
        """There is always room."""

    async def look(self, timeout_s: float) -> Snapshot | None:
        self.looks += 1
        return self.snapshot

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        self.requests.append(request)
        self.live.add(request.id)
        try:
            index = 0
            if not request.max_tokens:
                yield self._prompt_only(request)
                return
            for item in [*self.script(request), self.end_id]:
                await asyncio.sleep(item if isinstance(item, float) else 0)
                if isinstance(item, BaseException):
                    raise item
                if isinstance(item, Delta):
                    yield item
                    continue
                if isinstance(item, float):
                    continue
                delta = self._delta(request, index, item if isinstance(item, list) else [item])
                index += len(delta.token_ids)
                self.produced = index
                yield delta
                if delta.finish_reason is not None:
                    return
            yield Delta(id=request.id, index=index, token_ids=[], finish_reason=FinishReason.LENGTH)  # with ignore_eos
        finally:
            self.live.discard(request.id)

    def _prompt_only(self, request: GenerateRequest) -> Delta:
        """Hidden state [length of the prompt, last id, 1, 1]; log-probabilities -1, -2, ..."""
        pooled = None
        if request.pooling is not None:
            ids, prompt = request.pooling.ids, request.prompt_ids
            values = [-1.0 - i for i in range(len(ids))] if ids else [len(prompt), prompt[-1], 1, 1]
            pooled = np.array(values, "<f4").tobytes()
        return Delta(
            id=request.id,
            index=0,
            token_ids=[],
            finish_reason=FinishReason.LENGTH,
            prompt_logprobs=prompt_scores(request),
            pooled=pooled,
            cached_tokens=3,
            queue_s=0.001,
        )

    def _delta(self, request: GenerateRequest, index: int, tokens: list[int]) -> Delta:
        delta = Delta(id=request.id, index=index, token_ids=tokens)
        if index == 0:
            delta.cached_tokens, delta.queue_s = 3, 0.001
            delta.prompt_logprobs = prompt_scores(request)
        if request.params.logprobs is not None:
            best = list(range(request.params.logprobs))
            scores = [-0.5 - i for i in best]
            delta.logprobs = [TokenLogprob(logprob=-0.25, top_ids=best, top_logprobs=scores) for _ in tokens]
        if tokens[-1] in request.end_ids:
            delta.finish_reason, delta.stop_id = FinishReason.STOP, tokens[-1]
        elif index + len(tokens) >= request.max_tokens:
            delta.finish_reason = FinishReason.LENGTH
        return delta


def prompt_scores(request: GenerateRequest) -> list[TokenLogprob] | None:
    """The token at place i of the prompt has -i; so have the likeliest, ids 0, 1, ..."""
    count = request.params.prompt_logprobs
    if count is None or request.choice:
        return None
    return [TokenLogprob(-float(i), list(range(count)), [-float(i)] * count) for i in range(1, len(request.prompt_ids))]


@dataclass
class RecordingHooks:
    """Remembers every call by name."""

    calls: list[tuple[Any, ...]] = field(default_factory=list)

    def on_accepted(self, prompt_tokens: int) -> None:
        self.calls.append(("accepted", prompt_tokens))

    def on_first_token(self, ttft_s: float) -> None:
        self.calls.append(("first", ttft_s))

    def on_tokens(self, gap_s: float, num_tokens: int) -> None:
        self.calls.append(("tokens", gap_s, num_tokens))

    def on_finished(self, sequence: FinishedSequence) -> None:
        self.calls.append(("finished", sequence))

    def on_rejected(self, reason: str) -> None:
        self.calls.append(("rejected", reason))

    def on_http(self, route: str, method: str, code: int, seconds: float) -> None:
        self.calls.append(("http", route, method, code))

    def metrics_text(self) -> str:
        return "tpqwen_test 1\n"

    def named(self, name: str) -> list[tuple[Any, ...]]:
        """The calls of one name, without it."""
        return [c[1:] for c in self.calls if c[0] == name]


@dataclass
class Server:
    """The app and everything below it."""

    engine: FakeEngine
    hooks: RecordingHooks
    app: Any
    chat: ChatFormat


def make_server(
    script: Callable[[GenerateRequest], list[Any]] | None = None,
    variant: str = "hybrid",
    text_service: TextService | None = None,
    task: Task = Task.GENERATE,
    compiler: Compiler | None = None,
    access: Access | None = None,
    ranks: Callable[[], list[RankLoad]] = list,
    **settings: Any,
) -> Server:
    """An app with the fixture's tokenizer, over a fake engine."""
    engine = FakeEngine() if script is None else FakeEngine(script)
    model = tokenizer(variant)
    chat = ChatFormat(model, GenerationDefaults(temperature=0.6, top_k=20, top_p=0.95))
    limits = Limits(max_model_len=MAX_MODEL_LEN, vocab_size=model.vocabulary.size, end_ids=(engine.end_id,))
    info = ModelInfo(
        "qwen3-test",
        limits,
        created=1,
        versions={"tpqwen": "0.1.0"},
        task=task,
        hidden_size=4,
        yes_no=(7, 8),
    )
    hooks = RecordingHooks()
    app = build_app(
        engine,
        chat,
        info,
        hooks,
        ApiSettings(**settings),
        elsewhere=Elsewhere(text_service or ThreadText(chat, MAX_MODEL_LEN), compiler, ranks),
        access=access,
    )
    return Server(engine, hooks, app, chat)
