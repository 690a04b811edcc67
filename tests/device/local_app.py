"""The HTTP application over a real model in this process: engine thread, local executor, no Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import httpx

from tests.http.fake_engine import RecordingHooks
from tpqwen.api.access import Access
from tpqwen.api.app import Elsewhere, build_app
from tpqwen.api.info import ModelInfo
from tpqwen.compiler import CompileLimits, GrammarService
from tpqwen.config import Config
from tpqwen.engine.client import EngineClient
from tpqwen.engine.local import start_local_engine
from tpqwen.model.config import Task, detect_task
from tpqwen.offline import OfflineEngine
from tpqwen.structure import Compiler
from tpqwen.text.chat import ChatFormat, GenerationDefaults
from tpqwen.text.pooling import RerankPrompts
from tpqwen.text.sequences import Limits
from tpqwen.text.tokenizer import Tokenizer
from tpqwen.text.work import ThreadText

T = TypeVar("T")


def app_over(
    engine: EngineClient,
    offline: OfflineEngine,
    folder: Path,
    compiler: Compiler | None = None,
    access: Access | None = None,
) -> Any:
    """The application over a running engine. access: who may ask; without it, everyone."""
    chat = ChatFormat(Tokenizer(folder), GenerationDefaults(**offline.model_config.generation_defaults))
    task = detect_task(folder, folder.name)
    ids = min(offline.model_config.vocab_size, chat.vocabulary.size)
    info = ModelInfo(
        name="model",
        limits=Limits(offline.capacity.max_model_len, ids, offline.model_config.eos_token_ids),
        created=1,
        task=task,
        hidden_size=offline.model_config.hidden_size,
        yes_no=RerankPrompts(chat.model).yes_no if task is Task.RERANK else (0, 0),
    )
    elsewhere = Elsewhere(ThreadText(chat, info.limits.max_model_len), compiler)
    return build_app(engine, chat, info, RecordingHooks(), elsewhere=elsewhere, access=access)


def with_app(folder: Path, work: Callable[[httpx.AsyncClient], Awaitable[T]], **options: Any) -> T:
    """Run `work` with a client of the app over the checkpoint."""
    config = Config.load({"model": str(folder), "device": "cpu", "threads": 1, **options}, {})
    offline = OfflineEngine(config)

    async def run() -> T:
        engine = start_local_engine(offline.core, config.schedule)
        app = app_over(engine, offline, folder)
        try:
            transport = httpx.ASGITransport(app=app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=300) as client:
                return await work(client)
        finally:
            await engine.close()

    try:
        return asyncio.run(run())
    finally:
        offline.close()


class ServedModel:
    """The same as an ASGI application for a server: the engine starts and ends with the server's lifespan."""

    def __init__(self, folder: Path, access: Access | None = None, **options: Any) -> None:
        self._config = Config.load({"model": str(folder), "device": "cpu", "threads": 1, **options}, {})
        self._folder = folder
        self._access = access
        self._app: Any = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan":
            await self._app(scope, receive, send)
            return
        offline = OfflineEngine(self._config)
        engine = start_local_engine(offline.core, self._config.schedule)
        compiler = GrammarService(self._folder, offline.model_config.vocab_size, CompileLimits(timeout_s=30.0))
        self._app = app_over(engine, offline, self._folder, compiler, self._access)
        try:
            await self._app(scope, receive, send)
        finally:
            await compiler.close()
            await engine.close()
            offline.close()
