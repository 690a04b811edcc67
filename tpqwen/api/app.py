"""The HTTP surface as a raw ASGI application: routes, admission, one place where every error becomes an answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, cast

from starlette.types import Receive, Scope, Send

from tpqwen.api import messages, pooled, responses
from tpqwen.api.access import Access
from tpqwen.api.answers import Answer, ChatAnswer, CompletionAnswer, Frame, WholeAnswer
from tpqwen.api.body import LongBodies, read_json
from tpqwen.api.calls import Call, Prepared, check_tools, prepare, read_chat, read_completion
from tpqwen.api.deadline import Deadline
from tpqwen.api.events import EngineEvents
from tpqwen.api.exchange import Exchange
from tpqwen.api.failures import ClientLeft, failure
from tpqwen.api.guiding import guided
from tpqwen.api.hooks import RequestHooks
from tpqwen.api.info import ApiSettings, ModelInfo
from tpqwen.api.journal import Journal
from tpqwen.api.messages_answer import MessagesAnswer, error_body
from tpqwen.api.openapi import document, page
from tpqwen.api.page import PAGE, PAGE_HEADERS
from tpqwen.api.responses_answer import ResponsesAnswer
from tpqwen.api.running import Running
from tpqwen.api.stream import EventStream, collect, send_events
from tpqwen.api.tokens import TokenRoutes
from tpqwen.api.translation import client_names
from tpqwen.engine.protocol import Engine
from tpqwen.errors import EngineError, Overloaded, RequestError
from tpqwen.model.config import Task
from tpqwen.readings import RankLoad
from tpqwen.structure import Compiler
from tpqwen.text.chat import ChatFormat, Variant
from tpqwen.text.pipeline import OutputText
from tpqwen.text.work import PromptWork, Renderer, TextService, ThreadText

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
CLIENT_LEFT = 499
MAX_HEADER_BYTES = 16 * 1024
_FORBIDDEN_HEADERS = ("x-request-timeout-seconds", "x-request-disconnect-disabled")

Handler = Callable[[Exchange], Awaitable[None]]


@dataclass(frozen=True)
class Elsewhere:
    """What is done in other processes: prompts rendered, grammars compiled. ranks: their last readings."""

    text: TextService
    compiler: Compiler | None = None
    ranks: Callable[[], list[RankLoad]] = list


def build_app(
    engine: Engine,
    text: ChatFormat,
    info: ModelInfo,
    hooks: RequestHooks,
    settings: ApiSettings | None = None,
    all_metrics: Callable[[], Awaitable[str]] | None = None,
    elsewhere: Elsewhere | None = None,
    access: Access | None = None,
) -> Api:
    """The application over one engine.

    all_metrics: the metrics of all replicas, for /metrics; without it, or with ?scope=local: hooks.metrics_text().
    elsewhere: without it prompts are rendered in threads of this process, and requests for a form are refused.
    access: who may ask; without it, everyone.
    """
    elsewhere = elsewhere or Elsewhere(ThreadText(text, info.limits.max_model_len))
    return Api(engine, text, info, hooks, settings or ApiSettings(), all_metrics, elsewhere, access or Access())


@dataclass(frozen=True)
class _Endpoint:
    """An endpoint that runs the model: how its body is read, how its answer is written, which models have it."""

    read: Callable[[dict[str, Any], ModelInfo], Call]
    answer: Callable[[Frame], WholeAnswer]  # an Answer where the table has `stream`
    task: Task = Task.GENERATE


_CHAT = _Endpoint(read_chat, ChatAnswer)
_COMPLETION = _Endpoint(read_completion, CompletionAnswer)
_RESPONSE = _Endpoint(responses.read_responses, ResponsesAnswer)
_MESSAGE = _Endpoint(messages.read_message, MessagesAnswer)
_EMBEDDINGS = _Endpoint(pooled.read_embeddings, pooled.EmbeddingsAnswer, Task.EMBED)
_RERANK = _Endpoint(pooled.read_rerank, pooled.RerankAnswer, Task.RERANK)


class Api:
    """The ASGI callable. Holds no state of its own but a number; its journal does."""

    def __init__(
        self,
        engine: Engine,
        text: ChatFormat,
        info: ModelInfo,
        hooks: RequestHooks,
        settings: ApiSettings,
        all_metrics: Callable[[], Awaitable[str]] | None,
        elsewhere: Elsewhere,
        access: Access,
    ) -> None:
        self._engine = engine
        self._text = text
        self._info = info
        self._hooks = hooks
        self._journal = Journal(hooks)
        self._settings = settings
        self._all_metrics = all_metrics
        self._renderer = Renderer(text, info.limits.max_model_len)
        self._elsewhere = elsewhere
        self._long = LongBodies(settings.thread_above_bytes)
        tokens = TokenRoutes(text, elsewhere.text, info, settings, self._long)
        self._access = access
        events = EngineEvents(engine, elsewhere.ranks, settings)
        self.num_answering = 0  # generations that are not answered to the last byte
        self._routes: dict[str, dict[str, Handler]] = {
            "/v1/chat/completions": {"POST": lambda exchange: self._generate(exchange, _CHAT)},
            "/v1/completions": {"POST": lambda exchange: self._generate(exchange, _COMPLETION)},
            "/v1/responses": {"POST": lambda exchange: self._generate(exchange, _RESPONSE)},
            "/v1/messages": {"POST": lambda exchange: self._generate(exchange, _MESSAGE)},
            "/v1/messages/count_tokens": {"POST": tokens.count_tokens},
            "/v1/embeddings": {"POST": lambda exchange: self._generate(exchange, _EMBEDDINGS)},
            "/v1/rerank": {"POST": lambda exchange: self._generate(exchange, _RERANK)},
            "/tokenize": {"POST": tokens.tokenize},
            "/detokenize": {"POST": tokens.detokenize},
            "/v1/models": {"GET": self._models},
            "/v1/models/{id}": {"GET": self._model},
            "/v1/engine/events": {"GET": events.show},
            "/health": {"GET": self._health},
            "/ready": {"GET": self._ready},
            "/metrics": {"GET": self._metrics},
            "/version": {"GET": self._version},
            "/openapi.json": {"GET": self._openapi},
            "/docs": {"GET": self._docs},
            "/": {"GET": self._page},
        }

    @property
    def served(self) -> list[tuple[str, str]]:
        """Every (method, path) that is answered; a path may hold {id}.

        Not "routes": what has such, Serve takes for an app of Starlette's, and looks through them at every request.
        """
        return [(method, path) for path, handlers in self._routes.items() for method in handlers]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
        else:
            settings = self._settings
            await self._http(Exchange(scope, receive, send, settings.send_request_id, settings.body_timeout_s))

    async def _http(self, exchange: Exchange) -> None:
        route = "/v1/models/{id}" if exchange.path.startswith("/v1/models/") else exchange.path
        handlers = self._routes.get(route)
        if route.startswith("/v1/messages"):
            exchange.error_body = error_body
        status = CLIENT_LEFT
        try:
            await self._handler(exchange, handlers)(exchange)
            status = exchange.status or CLIENT_LEFT
        except ClientLeft:
            pass
        except Exception as error:
            failed = failure(error, exchange.request_id)
            await exchange.fail(failed)
            status = failed.status
        finally:
            self._journal.note(exchange, route if handlers else "other", exchange.counted_status or status)

    def _handler(self, exchange: Exchange, handlers: dict[str, Handler] | None) -> Handler:
        _check_headers(exchange)
        self._access.admit(exchange)
        if handlers is None:
            raise RequestError("there is nothing at this path", code="not_found", status=404)
        method = "GET" if exchange.method == "HEAD" else exchange.method
        if method in handlers:
            return handlers[method]
        allowed = ", ".join(handlers) + (", HEAD" if "GET" in handlers else "")
        return lambda exchange: self._method_not_allowed(exchange, allowed)

    async def _method_not_allowed(self, exchange: Exchange, allowed: str) -> None:
        error = RequestError(f"this path takes {allowed}", code="method_not_allowed", status=405)
        failed = failure(error, exchange.request_id)
        exchange.code = failed.code
        await exchange.reply(exchange.error_body(failed), 405, allow=allowed)

    # Generation

    async def _generate(self, exchange: Exchange, endpoint: _Endpoint) -> None:
        limits = self._settings
        running: list[Running] = []
        self.num_answering += 1
        try:
            self._check_task(endpoint)
            read: Callable[[dict[str, Any]], Call] = lambda body: endpoint.read(body, self._info)  # noqa: E731
            most = limits.max_body_bytes
            with self._access.counted(exchange):
                self._check_state()
                self._engine.check_room()  # a refusal must cost less than an answer, or refusing takes all there is
                call = await read_json(exchange.headers, exchange.receive, most, read=read, long=self._long)
                if not await exchange.until_client_leaves(self._answer(exchange, endpoint, call, running)):
                    exchange.counted_status = CLIENT_LEFT
        except (RequestError, EngineError) as error:
            if not running or isinstance(error, RequestError):
                self._hooks.on_rejected(failure(error, exchange.request_id).reject_reason)
            raise
        finally:
            self.num_answering -= 1
            for r in running:
                usage = r.usage
                exchange.numbers |= {"prompt": usage.prompt, "output": usage.completion, "cached": usage.cached}
                exchange.numbers |= r.stages

    async def _answer(self, exchange: Exchange, endpoint: _Endpoint, call: Call, running: list[Running]) -> None:
        """Run one call. `running` receives the sequences once they exist."""
        self._check_state()
        with client_names(call.names):
            prepared = self._access.marked(exchange, await self._prepared(call))
        vocabulary = self._text.vocabulary
        texts = [OutputText(vocabulary, prepared.params, prepared.start, prepared.calls) for _ in prepared.sequences]
        run = Running(self._engine, prepared, texts, self._hooks, exchange.arrived)
        running.append(run)
        self._access.watch(exchange, run)
        frame = Frame(
            request_id=exchange.request_id,
            call=call,
            info=self._info,
            vocabulary=vocabulary,
            created=int(time.time()),
            params=prepared.params,
            prompt_ids=prepared.prompt_ids,
        )
        answer = endpoint.answer(frame)
        deadline = Deadline(exchange.arrived, call.timeout_s, self._settings)
        if call.stream:
            stream = EventStream(exchange.send, self._settings, lambda: run.timing, exchange.give_up)
            status = await send_events(run, cast(Answer, answer), call, stream, deadline, exchange.request_id)
            exchange.counted_status = status
        else:
            deltas = await collect(run, deadline)
            await exchange.reply(answer.body(deltas, run.usage), server_timing=run.timing)

    async def _prepared(self, call: Call) -> Prepared:
        """Templates are rendered, long texts tokenized and grammars compiled elsewhere; ids and short prompts take
        microseconds here."""
        check_tools(call, self._text)
        work = call.work
        if isinstance(work, PromptWork) and self._is_light(work):
            rendered = self._renderer.run(work, call.truncate)
        else:
            rendered = await self._elsewhere.text.render(work, call.truncate)
        if call.tools.definitions:  # their schemas may be long
            prepared = await asyncio.to_thread(prepare, call, rendered, self._text, self._info)
        else:
            prepared = prepare(call, rendered, self._text, self._info)
        return await guided(call, prepared, self._info, self._text.vocabulary, self._elsewhere.compiler)

    def _is_light(self, work: PromptWork) -> bool:
        return sum(len(p) for p in work.prompts if isinstance(p, str)) <= self._settings.inline_below

    def _check_task(self, endpoint: _Endpoint) -> None:
        """Raises RequestError 404 when the served checkpoint is not made for this."""
        task = self._info.task
        if task is not endpoint.task:
            text = f"{self._info.name!r} is a model for: {task}; this endpoint needs one for: {endpoint.task}"
            raise RequestError(text, code="not_found", status=404)

    def _check_state(self) -> None:
        """Refuse early what the engine would refuse anyway. Raises Overloaded, EngineError."""
        state = self._engine.state
        if state.accepts:
            return
        if state.name in ("dead", "degraded"):
            raise EngineError(state.reason or "the engine is dead", code=state.error_code, status=503)
        text = f"the server is {state.name}" + (f": {state.reason}" if state.reason else "")
        raise Overloaded(text, code=state.name, status=503)

    # About the server

    async def _models(self, exchange: Exchange) -> None:
        await exchange.reply_json({"object": "list", "data": [self._described()]})

    async def _model(self, exchange: Exchange) -> None:
        name = exchange.path.removeprefix("/v1/models/")
        if name != self._info.name:
            message = f"the model {name[:64]!r} is not served here; {self._info.name!r} is"
            raise RequestError(message, param="model", code="model_not_found", status=404)
        await exchange.reply_json(self._described())

    def _described(self) -> dict[str, Any]:
        variant, generates = self._text.variant, self._info.task is Task.GENERATE
        return {
            "id": self._info.name,
            "object": "model",
            "created": self._info.created,
            "owned_by": self._info.owned_by,
            "max_model_len": self._info.limits.max_model_len,
            "demonstration": self._info.demonstration,
            "capabilities": {
                "completion": generates,
                "chat": generates and variant is not Variant.BASE,
                "thinking": generates and variant in (Variant.HYBRID, Variant.THINKING),
                "tools": generates and self._text.call_format is not None,
                "structured_output": generates and self._elsewhere.compiler is not None,
                "embeddings": self._info.task is Task.EMBED,
                "rerank": self._info.task is Task.RERANK,
            },
        }

    async def _health(self, exchange: Exchange) -> None:
        """Liveness of this process, with the engine's state; 503 only when the engine will not come back."""
        state = self._engine.state
        body = {"status": state.name, "reason": state.reason}
        await exchange.reply_json(body, 503 if state.name == "dead" else 200)

    async def _ready(self, exchange: Exchange) -> None:
        """200 only while new requests are taken."""
        state = self._engine.state
        body = {"ready": state.accepts, "status": state.name, "reason": state.reason}
        await exchange.reply_json(body, 200 if state.accepts else 503)

    async def _metrics(self, exchange: Exchange) -> None:
        local = self._all_metrics is None or "scope=local" in exchange.query.split("&")
        text = self._hooks.metrics_text() if local or self._all_metrics is None else await self._all_metrics()
        await exchange.reply(text.encode(), kind=METRICS_TYPE)

    async def _version(self, exchange: Exchange) -> None:
        await exchange.reply_json({**self._info.versions, "model": self._info.name, "tp": self._info.tp})

    async def _openapi(self, exchange: Exchange) -> None:
        await exchange.reply_json(document(self._info.versions.get("tpqwen", ""), self._info.name))

    async def _docs(self, exchange: Exchange) -> None:
        await exchange.reply(page().encode(), kind="text/html; charset=utf-8")

    async def _page(self, exchange: Exchange) -> None:
        await exchange.reply(PAGE, 200, "text/html; charset=utf-8", **PAGE_HEADERS)


def _check_headers(exchange: Exchange) -> None:
    """What a proxy in front should have refused. Raises RequestError."""
    for name in _FORBIDDEN_HEADERS:
        if name in exchange.headers:
            raise RequestError(f"the header {name} is not taken from clients", param=name, code="forbidden_header")
    if exchange.header_bytes > MAX_HEADER_BYTES:
        text = f"the headers are larger than {MAX_HEADER_BYTES} bytes"
        raise RequestError(text, code="headers_too_large", status=431)
    if "content-length" in exchange.headers and "transfer-encoding" in exchange.headers:
        raise RequestError("a body has a length or comes in chunks, not both", code="invalid_header")


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": message["type"] + ".complete"})
        if message["type"] == "lifespan.shutdown":
            return
