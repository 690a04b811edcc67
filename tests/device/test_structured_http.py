"""Forms, tools and budgets through the whole path but Ray: HTTP, compiling process, engine, two ranks, a model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import jsonschema

from tests.http.driver import events
from tests.http.fake_engine import RecordingHooks
from tests.http.test_tools import accumulated
from tests.ranks_in_threads import ThreadedExecutor
from tpqwen.api.app import Elsewhere, build_app
from tpqwen.api.info import ModelInfo
from tpqwen.compiler import CompileLimits, GrammarService
from tpqwen.config import EMBEDDED_MODEL, Config
from tpqwen.engine.core import EngineCore
from tpqwen.engine.local import start_local_engine
from tpqwen.model.config import ModelConfig
from tpqwen.text.chat import ChatFormat, GenerationDefaults
from tpqwen.text.sequences import Limits
from tpqwen.text.tokenizer import Tokenizer
from tpqwen.text.work import ThreadText

SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}, "kind": {"enum": ["a", "b"]}},
    "required": ["n", "kind"],
    "additionalProperties": False,
}
FORM = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}
PICK = {"type": "function", "function": {"name": "pick", "parameters": SCHEMA}}
PLAIN = {"chat_template_kwargs": {"enable_thinking": False}, "temperature": 1.5, "max_tokens": 150}
Ask = Callable[..., Awaitable[dict[str, Any]]]


def with_server(work: Callable[[httpx.AsyncClient], Awaitable[None]]) -> None:
    """The application over the embedded model, tp=2 with ranks in threads."""
    folder = Path(EMBEDDED_MODEL)
    options = {"model": EMBEDDED_MODEL, "tp": 2, "device": "cpu", "threads": 1, "dtype": "float32"}
    config = Config.load({**options, "max_model_len": 512, "max_num_seqs": 16}, {})
    model, executor = ModelConfig.from_folder(folder), ThreadedExecutor(config, folder)
    core = EngineCore(executor, executor.start(), schedule=config.schedule)
    chat = ChatFormat(Tokenizer(folder), GenerationDefaults(**model.generation_defaults))
    info = ModelInfo("m", Limits(512, chat.vocabulary.size, model.eos_token_ids), created=1)

    async def run() -> None:
        engine = start_local_engine(core, config.schedule)
        grammars = GrammarService(folder, model.vocab_size, CompileLimits(timeout_s=60.0))
        elsewhere = Elsewhere(ThreadText(chat, info.limits.max_model_len), grammars)
        app = build_app(engine, chat, info, RecordingHooks(), elsewhere=elsewhere)
        try:
            async with httpx.AsyncClient(
                transport=httpx.ASGITransport(app=app), base_url="http://test", timeout=120
            ) as client:
                await work(client)
        finally:
            await grammars.close()
            await engine.close()

    try:
        asyncio.run(run())
    finally:
        executor.stop()


def test_every_form_holds_whole_and_streamed_beside_free_requests() -> None:
    async def work(client: httpx.AsyncClient) -> None:
        async def ask(**body: Any) -> dict[str, Any]:
            asked = {"messages": [{"role": "user", "content": "Hello"}], **PLAIN, **body}
            answer = await client.post("/v1/chat/completions", json=asked)
            assert answer.status_code == 200, answer.text
            if not body.get("stream"):
                choice: dict[str, Any] = answer.json()["choices"][0]
                return choice
            told = events(answer.text)
            deltas = [c["delta"] for e in told[:-1] for c in e["choices"]]
            content = "".join(d.get("content") or "" for d in deltas)
            return {"message": {"content": content, "calls": accumulated(told)}}

        free = ask(seed=1)
        forms = [ask(response_format=FORM, seed=s) for s in range(4)]
        streamed = [ask(response_format=FORM, seed=s, stream=True) for s in range(4)]
        chosen = ask(structured_outputs={"choice": ["red", "green"]}, seed=3)
        thinking = ask(response_format=FORM, seed=3, chat_template_kwargs={"enable_thinking": True}, max_tokens=300)
        alone, *results = await asyncio.gather(free, *forms, *streamed, chosen, thinking)
        assert (await ask(seed=1))["message"] == alone["message"], "a free request is what it is alone"
        texts = [r["message"]["content"] for r in results]
        assert texts[:4] == texts[4:8]
        for text in [*texts[:4], texts[9]]:
            jsonschema.validate(json.loads(text), SCHEMA)
        assert len(set(texts[:4])) > 1
        assert texts[8] in ("red", "green")
        await check_calls(ask)
        bad = {"messages": [{"role": "user", "content": "x"}], "structured_outputs": {"regex": "("}}
        refused = await client.post("/v1/chat/completions", json=bad)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "structured_outputs.regex")
        await check_budget(ask)

    with_server(work)


async def check_calls(ask: Ask) -> None:
    """Demanded calls are valid whole and streamed; the same seed gives the same call."""
    for more in ({"tool_choice": {"type": "function", "function": {"name": "pick"}}}, {"tool_choice": "required"}):
        body = {"tools": [PICK], "seed": 2, "parallel_tool_calls": False, **more}
        whole, streamed = await asyncio.gather(ask(**body), ask(**body, stream=True))
        assert (whole["finish_reason"], whole["message"]["content"]) == ("tool_calls", None)
        (call,) = whole["message"]["tool_calls"]
        assert call["function"]["name"] == "pick"
        jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMA)
        assert [c["arguments"] for c in streamed["message"]["calls"]] == [call["function"]["arguments"]]


async def check_budget(ask: Ask) -> None:
    """A model that is made to write nothing but <think> is closed at its third token of reasoning; then the form."""
    opening = Tokenizer(EMBEDDED_MODEL).vocabulary.think_open
    on = {"chat_template_kwargs": {"enable_thinking": True}, "logit_bias": {str(opening): 100}}
    message = (await ask(thinking_token_budget=3, response_format=FORM, **on))["message"]
    thought, _, closing = message["reasoning_content"].partition("\n")
    assert thought == "<think>" * 3
    assert closing.strip().startswith("Considering the limited time") and closing.endswith("directly now.")
    jsonschema.validate(json.loads(message["content"]), SCHEMA)
