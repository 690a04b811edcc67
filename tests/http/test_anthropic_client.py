"""The official Anthropic client against a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import anthropic
import pytest

from tests.http.driver import HELLO
from tests.http.fake_engine import ids, make_server
from tests.http.serving import serving
from tpqwen.errors import EngineError

TEXT = "<think>\nI think\n</think>\n\nHello 日本 world"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(make_server(lambda request: ids(TEXT)).app) as base_url:
        yield base_url


def client(url: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, timeout=10)


def test_message_whole_streamed_and_counted(url: str) -> None:
    with client(url) as api:
        ask = {"model": "qwen3-test", "max_tokens": 50, "messages": HELLO}
        whole = api.messages.create(**ask)
        assert [block.type for block in whole.content] == ["thinking", "text"]
        with api.messages.stream(**ask) as stream:
            text = "".join(stream.text_stream)
            final = stream.get_final_message()
        assert text == "Hello 日本 world"
        assert [b.to_dict() for b in final.content] == [b.to_dict() for b in whole.content]
        assert final.usage == whole.usage
        count = api.messages.count_tokens(model="qwen3-test", messages=HELLO)
        assert count.input_tokens == whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)
        turns = [*HELLO, {"role": "assistant", "content": whole.content}, *HELLO]
        again = api.messages.create(model="qwen3-test", max_tokens=50, messages=turns)
        assert again.stop_reason == "end_turn"


def test_async_client_streams(url: str) -> None:
    async def work() -> str:
        async with (
            anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=0, timeout=10) as api,
            api.messages.stream(model="qwen3-test", max_tokens=50, messages=HELLO) as stream,
        ):
            return "".join([text async for text in stream.text_stream])

    assert asyncio.run(work()) == "Hello 日本 world"


def test_errors_have_the_clients_types(url: str) -> None:
    with client(url) as api:
        with pytest.raises(anthropic.NotFoundError):
            api.messages.create(model="claude", max_tokens=5, messages=HELLO)
        with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
            api.messages.create(model="qwen3-test", max_tokens=0, messages=HELLO)
    broken = make_server(lambda request: [*ids("Hello"), EngineError("rank 1 died", code="rank_dead", status=503)])
    with (
        serving(broken.app) as other,
        client(other) as api,
        pytest.raises(anthropic.APIStatusError, match="rank 1"),
        api.messages.stream(model="qwen3-test", max_tokens=50, messages=HELLO) as stream,
    ):
        list(stream.text_stream)
