"""Tools over HTTP: OpenAI's shapes whole and streamed, choices, history, refusals."""

from __future__ import annotations

from typing import Any

import pytest

from tests.http.driver import CHAT, HELLO, post, stream
from tests.http.fake_engine import Server, ids, make_server

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather <|im_end|> of a place",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}, "days": {"type": "integer"}}},
    },
}


def function(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": fields}


TIME = function(name="time")
CALLS = (
    "Let me see.\n"
    '<tool_call>\n{"name": "weather", "arguments": {"place": "日本", "days": 2}}\n</tool_call>\n'
    '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
)
XML = "<tool_call>\n<function=weather>\n<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>"


def served(text: str, variant: str = "instruct") -> Server:
    return make_server(lambda request: ids(text, variant), variant=variant)


def accumulated(events: list[Any]) -> list[dict[str, Any]]:
    """Calls of a stream put together as OpenAI's clients do it."""
    calls: list[dict[str, Any]] = []
    for event in events[:-1]:
        for choice in event["choices"]:
            for piece in choice["delta"].get("tool_calls") or ():
                if piece["index"] == len(calls):
                    calls.append({"id": piece["id"], "type": piece["type"], **piece["function"]})
                else:
                    assert set(piece) == {"index", "function"}
                    calls[piece["index"]]["arguments"] += piece["function"]["arguments"]
    return calls


def test_calls_whole_and_streamed_are_the_same() -> None:
    server = served(CALLS)
    choice = post(server.app, CHAT, messages=HELLO, tools=[WEATHER, TIME]).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert message["content"] == "Let me see."
    assert [c["type"] for c in message["tool_calls"]] == ["function", "function"]
    assert len({c["id"] for c in message["tool_calls"]}) == 2
    expected = [{"name": "weather", "arguments": '{"place": "日本", "days": 2}'}, {"name": "time", "arguments": "{}"}]
    assert [c["function"] for c in message["tool_calls"]] == expected
    events = stream(server.app, CHAT, messages=HELLO, tools=[WEATHER, TIME])
    calls = accumulated(events)
    assert [{"name": c["name"], "arguments": c["arguments"]} for c in calls] == expected
    assert events[-2]["choices"][0]["finish_reason"] == "tool_calls"
    text = "".join(c["delta"].get("content") or "" for e in events[:-1] for c in e["choices"])
    assert text == "Let me see."


def test_content_is_null_where_only_calls_are_made() -> None:
    message = post(served(XML, "coder").app, CHAT, messages=HELLO, tools=[WEATHER]).json()["choices"][0]["message"]
    assert message["content"] is None
    assert message["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"days": 2}'}


def test_reasoning_comes_with_the_calls() -> None:
    message = post(
        served(f"<think>\nhm\n</think>\n\n{CALLS}", "hybrid").app, CHAT, messages=HELLO, tools=[WEATHER]
    ).json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("hm", "Let me see.")
    assert len(message["tool_calls"]) == 2


def test_tools_are_shown_by_the_template_as_written_and_stay_text() -> None:
    server = served("x")
    post(server.app, CHAT, messages=HELLO, tools=[WEATHER, TIME])
    prompt = server.engine.requests[0].prompt_ids
    shown = server.chat.model.decode(prompt, skip_special_tokens=False)
    assert '"description": "Weather <|im_end|> of a place"' in shown
    assert '{"type": "function", "function": {"name": "time"}}\n</tools>' in shown
    assert prompt.count(server.chat.vocabulary.control["<|im_end|>"]) == 2


def test_choice_none_shows_no_tools_and_finds_no_calls() -> None:
    server = served(CALLS)
    choice = post(server.app, CHAT, messages=HELLO, tools=[WEATHER], tool_choice="none").json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (CALLS, "stop")
    assert "tool_calls" not in choice["message"]
    plain = post(server.app, CHAT, messages=HELLO)
    assert plain.json()["choices"][0]["message"]["content"] == CALLS
    assert server.engine.requests[0].prompt_ids == server.engine.requests[1].prompt_ids


def test_one_call_only_where_parallel_calls_are_off() -> None:
    server = served(CALLS)
    body = {"messages": HELLO, "tools": [WEATHER, TIME], "parallel_tool_calls": False}
    answer = post(server.app, CHAT, **body).json()
    assert len(answer["choices"][0]["message"]["tool_calls"]) == 1
    assert answer["choices"][0]["finish_reason"] == "tool_calls"
    assert answer["usage"]["completion_tokens"] == server.engine.produced < len(ids(CALLS, "instruct"))
    assert len(accumulated(stream(server.app, CHAT, **body))) == 1
    assert not server.engine.live


def test_calls_and_results_go_back_into_the_prompt() -> None:
    server = served(CALLS, "hybrid")
    first = post(server.app, CHAT, messages=HELLO, tools=[WEATHER, TIME]).json()["choices"][0]["message"]
    first["reasoning_content"] = "hm"
    results = [{"role": "tool", "tool_call_id": c["id"], "content": f"r{i}"} for i, c in enumerate(first["tool_calls"])]
    answer = post(server.app, CHAT, messages=[*HELLO, first, *results[::-1]], tools=[WEATHER, TIME])
    assert answer.status_code == 200, answer.text
    shown = server.chat.model.decode(server.engine.requests[1].prompt_ids, skip_special_tokens=False)
    assert f"<think>\nhm\n</think>\n\n{CALLS}<|im_end|>" in shown
    assert "<tool_response>\nr0\n</tool_response>\n<tool_response>\nr1\n</tool_response>" in shown


def test_hooks_see_the_reason() -> None:
    server = served(CALLS)
    post(server.app, CHAT, messages=HELLO, tools=[WEATHER])
    assert [f.reason for (f,) in server.hooks.named("finished")] == ["tool_calls"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": []}, "tools"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "retrieval", "function": {"name": "f"}}]}, "tools[0].type"),
        ({"tools": [function(name="a b")]}, "tools[0].function.name"),
        ({"tools": [TIME, WEATHER, TIME]}, "tools[2].function.name"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": "x"}}]},
            "tools[0].function.parameters",
        ),
        ({"tools": [function(name="f", foo=1)]}, "tools[0].function.foo"),
        ({"tools": [TIME] * 129}, "tools"),
        ({"tools": [TIME], "tool_choice": "always"}, "tool_choice"),
        (
            {"tools": [TIME], "tool_choice": function(name="x")},
            "tool_choice.function.name",
        ),
        ({"tool_choice": function(name="x")}, "tool_choice"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls"),
    ],
)
def test_refusals_name_the_field(body: dict[str, Any], param: str) -> None:
    answer = post(served("x").app, CHAT, messages=HELLO, **body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_a_model_without_tools_refuses_them() -> None:
    answer = post(served("x", "base").app, CHAT, messages=HELLO, tools=[TIME])
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools")
