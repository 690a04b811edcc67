"""/v1/messages: Anthropic's message, its events in the official order, its errors, and how blocks become messages."""

from __future__ import annotations

from typing import Any

import pytest
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import TypeAdapter

from tests.http.driver import HELLO, events, exchange, post
from tests.http.fake_engine import Server, ids, make_server
from tests.http.test_structured import FakeCompiler
from tpqwen.api.messages import messages_of
from tpqwen.errors import EngineError, Overloaded

MESSAGES, COUNT = "/v1/messages", "/v1/messages/count_tokens"
THOUGHT = "<think>\nI think\n</think>\n\nHello 日本"
_event: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)


def served(text: str = THOUGHT) -> Server:
    return make_server(lambda request: ids(text))


def ask(server: Server, **body: Any) -> Any:
    return post(server.app, MESSAGES, **{"messages": HELLO, "max_tokens": 200, **body})


def streamed(server: Server, **body: Any) -> list[Any]:
    answer = ask(server, stream=True, **body)
    assert answer.status_code == 200, answer.text
    names = [line.removeprefix("event: ") for line in answer.text.splitlines() if line.startswith("event: ")]
    found = events(answer.text)
    assert names == [e["type"] for e in found]
    return found


def test_whole_message_is_anthropics_object() -> None:
    body = ask(served()).json()
    Message.model_validate(body)
    assert body["content"] == [
        {"type": "thinking", "thinking": "I think", "signature": ""},
        {"type": "text", "text": "Hello 日本"},
    ]
    assert (body["stop_reason"], body["stop_sequence"], body["role"]) == ("end_turn", None, "assistant")
    usage = body["usage"]
    assert usage["cache_read_input_tokens"] == 3
    count = post(served().app, COUNT, messages=HELLO).json()["input_tokens"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == count


def test_events_come_in_the_official_order_and_say_the_same() -> None:
    found = streamed(served())
    for event in found:
        _event.validate_python(event)
    order = [name for i, name in enumerate(e["type"] for e in found) if name != found[i - 1]["type"] or i == 0]
    block = ["content_block_start", "content_block_delta", "content_block_stop"]
    assert order == ["message_start", *block, *block, "message_delta", "message_stop"]
    assert [e["index"] for e in found if e["type"] == "content_block_start"] == [0, 1]
    texts = [e["delta"]["text"] for e in found if e.get("delta", {}).get("type") == "text_delta"]
    assert "".join(texts) == "Hello 日本" and len(texts) > 1
    kinds = [e["delta"]["type"] for e in found if e["type"] == "content_block_delta" and e["index"] == 0]
    assert kinds[-1] == "signature_delta" and set(kinds[:-1]) == {"thinking_delta"}
    whole = ask(served()).json()
    assert found[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert found[-2]["usage"] == whole["usage"]
    assert found[0]["message"]["usage"]["input_tokens"] == whole["usage"]["input_tokens"]


def test_blocks_become_messages() -> None:
    text = {"type": "text", "text": "t", "cache_control": {"type": "ephemeral"}}
    use = {"type": "tool_use", "id": "c1", "name": "f", "input": {"x": 1}}
    result = {"type": "tool_result", "tool_use_id": "c1"}
    given = [
        {"role": "user", "content": [text, {"type": "text", "text": "u"}]},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "R", "signature": "s"}, text, use]},
        {"role": "user", "content": [{**result, "content": [text], "is_error": True}, text]},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": [result]},
    ]  # fmt: skip
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    assert messages_of(given, [text]) == [
        {"role": "system", "content": "t"},
        {"role": "user", "content": "tu"},
        {"role": "assistant", "content": "t", "reasoning_content": "R", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "Error: t"},
        {"role": "user", "content": "t"},
        {"role": "assistant", "content": "A"},
        {"role": "tool", "tool_call_id": "c1", "content": ""},
    ]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"max_tokens": None}, "max_tokens is missing"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "foo": 1}]}, "messages[0].foo"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "disabled", "budget_tokens": 5}}, "thinking.budget_tokens"),
        ({"stop_sequences": ["a"] * 5}, "stop_sequences"),
        ({"temperature": 3}, "temperature"),
        ({"max_tokens": 10**6}, "context holds"),
        ({"foo": 1}, "foo"),
        ({"mcp_servers": []}, "mcp_servers"),
    ],
    ids=str,
)
def test_bad_requests_are_refused_by_name_in_anthropics_shape(body: dict[str, Any], words: str) -> None:
    server = served()
    answer = ask(server, **body)
    error = answer.json()
    assert (answer.status_code, error["type"], error["error"]["type"]) == (400, "error", "invalid_request_error")
    assert words in error["error"]["message"]
    assert not server.engine.requests


def test_other_errors_have_anthropics_types() -> None:
    server = make_server(lambda request: [Overloaded("full", code="queue_full")])
    full = ask(server)
    assert (full.status_code, full.json()["error"]["type"]) == (429, "rate_limit_error")
    assert full.headers["retry-after"] == "1"
    assert ask(server, model="claude").json()["error"]["type"] == "not_found_error"
    assert exchange(server.app, "GET", MESSAGES).json()["error"]["type"] == "invalid_request_error"
    assert exchange(server.app, "GET", MESSAGES).headers["allow"] == "POST"
    broken = make_server(lambda request: [*ids("Hello"), EngineError("rank 1 died", code="rank_dead", status=503)])
    last = streamed(broken)[-1]
    assert last == {"type": "error", "error": {"type": "overloaded_error", "message": "rank 1 died"}}


CALLING = (
    "<think>\nhm\n</think>\n\nLet me see." + 2 * '\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
)
TOOL = {"name": "f", "input_schema": {"type": "object", "properties": {"x": {"type": "integer"}}}}


def test_tool_use_whole_streamed_and_sent_back() -> None:
    server = served(CALLING)
    whole = ask(server, tools=[TOOL]).json()
    Message.model_validate(whole)
    assert [b["type"] for b in whole["content"]] == ["thinking", "text", "tool_use", "tool_use"]
    assert (whole["content"][2]["input"], whole["stop_reason"]) == ({"x": 1}, "tool_use")
    found = streamed(served(CALLING), tools=[TOOL])
    for event in found:
        _event.validate_python(event)
    started = [e["content_block"] for e in found if e["type"] == "content_block_start"][2]
    assert (started["type"], started["name"], started["input"]) == ("tool_use", "f", {})
    parts = [e["delta"]["partial_json"] for e in found if e["type"] == "content_block_delta" and e["index"] == 2]
    assert "".join(parts) == '{"x": 1}'
    assert found[-2]["delta"]["stop_reason"] == "tool_use"
    results = [{"type": "tool_result", "tool_use_id": b["id"], "content": "42"} for b in whole["content"][2:]]
    turns = [*HELLO, {"role": "assistant", "content": whole["content"]}, {"role": "user", "content": results}]
    assert ask(server, messages=turns, tools=[TOOL]).status_code == 200
    sent = server.chat.model.decode(server.engine.requests[-1].prompt_ids, skip_special_tokens=False)
    assert sent.count("<tool_response>\n42\n</tool_response>") == 2
    assert "<think>\nhm\n</think>" in sent


def test_demanded_tools_and_forms_reach_the_engine() -> None:
    for body in (
        {"tools": [TOOL], "tool_choice": {"type": "any"}},
        {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "f"}},
        {"output_config": {"format": {"type": "json_schema", "schema": TOOL["input_schema"]}}},
    ):
        server = make_server(compiler=FakeCompiler())
        assert ask(server, **body).status_code == 200
        assert server.engine.requests[0].guide is not None
