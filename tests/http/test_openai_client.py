"""The official client against a real socket: uvicorn in a thread, the app over the fake engine."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import openai
import pydantic
import pytest

from tests.http.driver import HELLO
from tests.http.fake_engine import ids, make_server
from tests.http.serving import serving
from tpqwen.errors import EngineError, Overloaded

TEXT = "<think>\nI think\n</think>\n\nHello 日本 world"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(make_server(lambda request: ids(TEXT)).app) as base_url:
        yield base_url


def client(url: str, retries: int = 0) -> openai.OpenAI:
    return openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=retries, timeout=10)


def test_chat_whole_and_streamed(url: str) -> None:
    with client(url) as api:
        answer = api.chat.completions.create(model="qwen3-test", messages=HELLO)
        message: Any = answer.choices[0].message
        assert (message.content, message.reasoning_content) == ("Hello 日本 world", "I think")
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        assert answer.usage.prompt_tokens_details.cached_tokens == 3
        chunks = list(
            api.chat.completions.create(
                model="qwen3-test", messages=HELLO, stream=True, stream_options={"include_usage": True}
            )
        )
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == message.content
        assert chunks[-1].usage == answer.usage
        again = api.chat.completions.create(
            model="qwen3-test", messages=[*HELLO, answer.choices[0].message.model_dump(), *HELLO], n=2
        )
        assert len(again.choices) == 2


def test_tool_calls_come_through_the_clients_own_stream_helper() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}, "strict": True}}
    text = (
        'See:\n<tool_call>\n{"name": "f", "arguments": {"x": "日本", "y": [1]}}\n</tool_call>\n<tool_call>{"name": "f"}'
    )

    class Compiler:
        async def compile(self, structure: Any, param: str) -> bytes:
            return b"compiled"

    with serving(make_server(lambda request: ids(text), compiler=Compiler()).app) as url, client(url) as api:
        whole = api.chat.completions.create(model="qwen3-test", messages=HELLO, tools=[tool]).choices[0]
        with api.chat.completions.stream(model="qwen3-test", messages=HELLO, tools=[tool]) as stream:
            kinds = [event.type for event in stream]
            streamed = stream.get_final_completion().choices[0]
        for choice in (whole, streamed):
            assert choice.finish_reason == "tool_calls"
            assert choice.message.content == "See:"
            assert [c.function.arguments for c in choice.message.tool_calls or []] == ['{"x": "日本", "y": [1]}', "{}"]
        assert kinds.count("tool_calls.function.arguments.done") == 2
        assert kinds.count("tool_calls.function.arguments.delta") > 5


def test_parse_gives_a_typed_object() -> None:
    class Point(pydantic.BaseModel):
        x: int

    class Compiler:
        async def compile(self, structure: Any, param: str) -> bytes:
            assert param == "response_format.json_schema.schema"
            return b"compiled"

    with serving(make_server(lambda request: ids('{"x": 5}'), compiler=Compiler()).app) as url, client(url) as api:
        answer = api.chat.completions.parse(model="qwen3-test", messages=HELLO, response_format=Point)
        assert answer.choices[0].message.parsed == Point(x=5)


def test_completions_and_models(url: str) -> None:
    with client(url) as api:
        answer = api.completions.create(model="qwen3-test", prompt=["a", "b"], max_tokens=3, logprobs=1)
        assert [c.finish_reason for c in answer.choices] == ["length", "length"]
        pieces = [c.choices[0].text for c in api.completions.create(model="qwen3-test", prompt="a", stream=True)]
        assert "".join(pieces) == TEXT
        assert [m.id for m in api.models.list()] == ["qwen3-test"]
        assert api.models.retrieve("qwen3-test").owned_by == "tpqwen"


def test_async_client_streams(url: str) -> None:
    async def work() -> str:
        async with openai.AsyncOpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=10) as api:
            whole = await api.chat.completions.create(model="qwen3-test", messages=HELLO)
            stream = await api.chat.completions.create(model="qwen3-test", messages=HELLO, stream=True)
            text = "".join([c.choices[0].delta.content or "" async for c in stream])
            assert text == whole.choices[0].message.content
            return text

    assert asyncio.run(work()) == "Hello 日本 world"


def test_errors_have_the_clients_types(url: str) -> None:
    with client(url) as api:
        with pytest.raises(openai.BadRequestError) as bad:
            api.chat.completions.create(model="qwen3-test", messages=HELLO, extra_body={"foo": 1})
        assert (bad.value.code, bad.value.param) == ("unknown_parameter", "foo")
        with pytest.raises(openai.NotFoundError):
            api.chat.completions.create(model="gpt-4", messages=HELLO)


def test_broken_stream_raises_and_overload_is_retried() -> None:
    attempts: list[Any] = []

    def script(request: Any) -> list[Any]:
        attempts.append(request)
        if len(attempts) == 1:
            return [Overloaded("full", code="queue_full", retry_after_s=0.1)]
        return [*ids("Hello"), EngineError("rank 1 died", code="rank_dead", status=503)]

    with serving(make_server(script).app) as url, client(url, retries=1) as api:
        stream = api.chat.completions.create(model="qwen3-test", messages=HELLO, stream=True)
        assert len(attempts) == 2
        with pytest.raises(openai.APIError) as broken:
            list(stream)
        assert broken.value.code == "rank_dead"


def test_responses_whole_and_streamed(url: str) -> None:
    with client(url) as api:
        whole = api.responses.create(model="qwen3-test", input="hi", instructions="Be brief", max_output_tokens=50)
        assert whole.output_text == "Hello 日本 world"
        assert [item.type for item in whole.output] == ["reasoning", "message"]
        with api.responses.stream(model="qwen3-test", input="hi") as stream:
            text = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
            final = stream.get_final_response()
        assert text == final.output_text == whole.output_text
        turns: Any = [{"role": "user", "content": "hi"}, *[i.model_dump() for i in whole.output]]
        again = api.responses.create(model="qwen3-test", input=[*turns, {"role": "user", "content": "and?"}])
        assert again.status == "completed"
        with pytest.raises(openai.BadRequestError) as bad:
            api.responses.create(model="qwen3-test", input="hi", previous_response_id="x")
        assert bad.value.param == "previous_response_id"


def test_closed_stream_stops_the_request() -> None:
    server = make_server(lambda request: [*ids("a"), 0.002] * 200)
    done = threading.Event()
    finished = server.hooks.on_finished

    def on_finished(sequence: Any) -> None:
        finished(sequence)
        done.set()

    server.hooks.on_finished = on_finished  # type: ignore[method-assign]
    with serving(server.app) as url, client(url) as api:
        stream = api.chat.completions.create(model="qwen3-test", messages=HELLO, stream=True)
        next(iter(stream))
        stream.close()
        assert done.wait(10)
        assert not server.engine.live
    assert [f.reason for (f,) in server.hooks.named("finished")] == ["abort"]
