"""/v1/responses: its object, its events in the official order, and how items become messages."""

from __future__ import annotations

from typing import Any

import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from tests.http.driver import events, post
from tests.http.fake_engine import Server, ids, make_server
from tests.http.test_errors import check_error
from tests.http.test_structured import FakeCompiler
from tpqwen.api.responses import messages_of
from tpqwen.errors import EngineError

RESPONSES = "/v1/responses"
THOUGHT = "<think>\nI think\n</think>\n\nHello 日本"
CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"x": 1}'}
PART = {"type": "input_text", "text": "a"}
IMAGE = {"type": "input_image"}
SECRET = {"type": "reasoning", "encrypted_content": "x"}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": "42"}
_event: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def served(text: str = THOUGHT) -> Server:
    return make_server(lambda request: ids(text))


def streamed(server: Server, **body: Any) -> list[Any]:
    answer = post(server.app, RESPONSES, stream=True, **body)
    assert answer.status_code == 200, answer.text
    names = [line.removeprefix("event: ") for line in answer.text.splitlines() if line.startswith("event: ")]
    found = events(answer.text)
    assert names == [e["type"] for e in found]
    assert [e["sequence_number"] for e in found] == list(range(len(found)))
    return found


def test_whole_response_is_openais_object() -> None:
    body = post(served().app, RESPONSES, input="hi", instructions="Be brief", max_output_tokens=50).json()
    response = Response.model_validate(body)
    assert response.output_text == "Hello 日本"
    reasoning, message = body["output"]
    assert (reasoning["type"], reasoning["content"][0]) == ("reasoning", {"type": "reasoning_text", "text": "I think"})
    assert (message["type"], message["role"], message["status"]) == ("message", "assistant", "completed")
    assert (body["status"], body["incomplete_details"], body["store"]) == ("completed", None, False)
    assert (body["instructions"], body["max_output_tokens"], body["temperature"]) == ("Be brief", 50, 0.6)
    usage = body["usage"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert usage["output_tokens_details"] == {"reasoning_tokens": len(ids("\nI think\n"))}
    assert usage["input_tokens_details"]["cached_tokens"] == 3


def test_events_come_in_the_official_order_and_say_the_same() -> None:
    whole = post(served().app, RESPONSES, input="hi").json()
    found = streamed(served(), input="hi")
    for event in found:
        _event.validate_python(event)
    order = [name for i, name in enumerate(e["type"] for e in found) if name != found[i - 1]["type"] or i == 0]
    assert order == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.reasoning_text.delta",
        "response.reasoning_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    deltas = [e["delta"] for e in found if e["type"] == "response.output_text.delta"]
    assert "".join(deltas) == "Hello 日本" and len(deltas) > 1
    last = found[-1]["response"]
    strip = lambda r: [{k: v for k, v in item.items() if k != "id"} for item in r["output"]]  # noqa: E731
    assert strip(last) == strip(whole)
    assert last["usage"] == whole["usage"]
    assert [e["item"] for e in found if e["type"] == "response.output_item.done"] == last["output"]


def test_full_length_is_incomplete() -> None:
    body = post(served("one two three").app, RESPONSES, input="hi", max_output_tokens=1).json()
    assert (body["status"], body["output"][0]["status"]) == ("incomplete", "incomplete")
    last = streamed(served("one two three"), input="hi", max_output_tokens=1)[-1]
    assert (last["type"], last["response"]["incomplete_details"]["reason"]) == (
        "response.incomplete",
        "max_output_tokens",
    )


def test_an_answer_without_text_has_an_empty_message() -> None:
    body = post(served("").app, RESPONSES, input="hi").json()
    assert [i["content"][0]["text"] for i in body["output"]] == [""]
    assert [e["type"] for e in streamed(served(""), input="hi")].count("response.output_text.done") == 1


def test_items_become_messages() -> None:
    given = [
        {"role": "developer", "content": "Rules"},
        {"type": "message", "role": "user", "content": [PART, {**PART, "text": "b"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "R"}]},
        {**CALL, "id": "fc_1", "status": "completed"},
        {**CALL, "call_id": "c2"},
        {**OUTPUT, "call_id": "c2", "output": [{"type": "input_text", "text": "43"}]},
        OUTPUT,
        {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed",
         "content": [{"type": "output_text", "text": "A", "annotations": [], "logprobs": []}]},
        {"role": "assistant", "content": "B"},
        {"role": "user", "content": "Q"},
    ]  # fmt: skip
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    assert messages_of(given, "I") == [
        {"role": "system", "content": "I"},
        {"role": "developer", "content": "Rules"},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "", "reasoning_content": "R", "tool_calls": [call, {**call, "id": "c2"}]},
        {"role": "tool", "tool_call_id": "c2", "content": "43"},
        {"role": "tool", "tool_call_id": "c1", "content": "42"},
        {"role": "assistant", "content": "A"},
        {"role": "assistant", "content": "B"},
        {"role": "user", "content": "Q"},
    ]


def test_an_answer_can_be_sent_back() -> None:
    server = served()
    output = post(server.app, RESPONSES, input="hi").json()["output"]
    again = post(
        server.app, RESPONSES, input=[{"role": "user", "content": "hi"}, *output, {"role": "user", "content": "?"}]
    )
    assert again.status_code == 200, again.text


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({}, "missing_field", "input"),
        ({"input": 5}, "invalid_type", "input"),
        ({"input": [5]}, "invalid_type", "input[0]"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "unsupported_content", "input[0].type"),
        ({"input": [{"role": "user", "content": [IMAGE]}]}, "unsupported_content", "input[0].content[0]"),
        ({"input": [{"role": "wizard", "content": "x"}]}, "invalid_value", "input[0].role"),
        ({"input": [{"role": "user", "content": "x", "foo": 1}]}, "unknown_parameter", "input[0].foo"),
        ({"input": [OUTPUT]}, "invalid_value", "input[0]"),
        ({"input": [SECRET]}, "unsupported_content", "input[0].encrypted_content"),
        ({"input": "x", "store": True}, "unsupported_parameter", "store"),
        ({"input": "x", "previous_response_id": "r"}, "unsupported_parameter", "previous_response_id"),
        ({"input": "x", "max_output_tokens": 10**6}, "context_length_exceeded", "max_output_tokens"),
        ({"input": "x", "top_logprobs": 1}, "invalid_value", "top_logprobs"),
        ({"input": "x", "tools": [{"type": "web_search"}]}, "unsupported_value", "tools[0].type"),
        ({"input": "x", "messages": []}, "unknown_parameter", "messages"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_requests_are_refused_by_name(body: dict[str, Any], code: str, param: str) -> None:
    server = served()
    check_error(post(server.app, RESPONSES, **body), 400, code, param)
    assert not server.engine.requests


def test_a_failure_in_the_stream_is_one_error_event() -> None:
    server = make_server(lambda request: [*ids("Hello"), EngineError("rank 1 died", code="rank_dead", status=503)])
    last = streamed(server, input="hi")[-1]
    assert (last["type"], last["code"], last["error"]["type"]) == ("error", "rank_dead", "server_error")


CALLING = (
    "<think>\nhm\n</think>\n\nLet me see." + 2 * '\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
)
FUNCTION = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}


def test_function_calls_whole_streamed_and_sent_back() -> None:
    server = served(CALLING)
    whole = post(server.app, RESPONSES, input="hi", tools=[FUNCTION]).json()
    Response.model_validate(whole)
    assert [i["type"] for i in whole["output"]] == ["reasoning", "message", "function_call", "function_call"]
    calls = whole["output"][2:]
    assert [(c["name"], c["arguments"]) for c in calls] == [("f", '{"x": 1}')] * 2
    found = streamed(served(CALLING), input="hi", tools=[FUNCTION])
    for event in found:
        _event.validate_python(event)
    of_call = [e for e in found if e.get("output_index") == 2]
    assert [e["type"].removeprefix("response.") for e in (of_call[0], *of_call[-2:])] == [
        "output_item.added",
        "function_call_arguments.done",
        "output_item.done",
    ]
    assert "".join(e["delta"] for e in of_call[1:-2]) == of_call[-2]["arguments"] == '{"x": 1}'
    results = [{**OUTPUT, "call_id": c["call_id"]} for c in calls]
    turns = [{"role": "user", "content": "hi"}, *whole["output"], *results]
    again = post(server.app, RESPONSES, input=turns, tools=[FUNCTION])
    assert again.status_code == 200, again.text
    sent = server.chat.model.decode(server.engine.requests[-1].prompt_ids, skip_special_tokens=False)
    assert sent.count("<tool_response>\n42\n</tool_response>") == 2


def test_demanded_calls_and_forms_reach_the_engine() -> None:
    for body in (
        {"tools": [FUNCTION], "tool_choice": "required"},
        {"tools": [FUNCTION], "tool_choice": {"type": "function", "name": "f"}},
        {"text": {"format": {"type": "json_schema", "name": "n", "schema": FUNCTION["parameters"], "strict": True}}},
    ):
        server = make_server(compiler=FakeCompiler())
        assert post(server.app, RESPONSES, input="hi", **body).status_code == 200
        assert server.engine.requests[0].guide is not None
