"""What the embedded model really says, through the whole HTTP path: thinking, tool calls, JSON, and its own end.

All of it with int8 weights as well.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.device.local_app import ServedModel
from tests.http.driver import events
from tests.http.serving import serving
from tests.http.test_tools import accumulated
from tpqwen.config import EMBEDDED_MODEL

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Get the weather in a city", "parameters": CITY},
}
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
FORM = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
MARIA = "Give me JSON with name and age: Maria is 34 years old."
QUESTIONS = [
    "Hello!",
    "What can you do?",
    "What is 17 + 25?",
    "Count from 1 to 20.",
    "Tell me a story about a fox.",
    MARIA,
]


@pytest.fixture(scope="module", params=["none", "int8"])
def client(request: pytest.FixtureRequest) -> Iterator[httpx.Client]:
    served = ServedModel(Path(EMBEDDED_MODEL), max_model_len=2048, quantization=request.param)
    with serving(served) as url, httpx.Client(base_url=url, timeout=120) as found:
        yield found


def ask(client: httpx.Client, messages: list[dict[str, Any]] | str, *, thinking: bool, **more: Any) -> Any:
    """A greedy answer: one choice, or the text of all events if it is streamed."""
    said = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    body = {"messages": said, "temperature": 0, "chat_template_kwargs": {"enable_thinking": thinking}, **more}
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.text if more.get("stream") else answer.json()["choices"][0]


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("question", QUESTIONS)
def test_answers_end_by_themselves_and_think_when_asked(client: httpx.Client, question: str, thinking: bool) -> None:
    choice = ask(client, question, thinking=thinking)
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["content"].strip() and "think>" not in choice["message"]["content"]
    assert bool(choice["message"].get("reasoning")) is thinking


def test_it_says_what_it_is(client: httpx.Client) -> None:
    content = ask(client, "What can you do?", thinking=False)["message"]["content"]
    assert "demonstration model" in content and "know very little" in content


def test_a_sum_is_worked_out_in_sight_streamed_as_whole(client: httpx.Client) -> None:
    message = ask(client, "What is 17 + 25?", thinking=True)["message"]
    assert message["content"] == "17 + 25 = 42"
    assert "7 + 5 = 12, write 2, carry 1" in message["reasoning"]
    told = events(ask(client, "What is 17 + 25?", thinking=True, stream=True))
    deltas = [c["delta"] for e in told[:-1] for c in e["choices"]]
    assert "".join(d.get("reasoning") or "" for d in deltas) == message["reasoning"]
    assert "".join(d.get("content") or "" for d in deltas) == message["content"]
    first_answer = next(i for i, d in enumerate(deltas) if d.get("content"))
    assert not any(d.get("reasoning") for d in deltas[first_answer:])


@pytest.mark.parametrize("thinking", [True, False])
def test_a_tool_is_called_and_its_result_is_told(client: httpx.Client, thinking: bool) -> None:
    question = {"role": "user", "content": "What is the weather in Paris?"}
    choice = ask(client, [question], thinking=thinking, tools=[WEATHER])
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "get_weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Paris"}
    assert bool(choice["message"].get("reasoning")) is thinking
    (streamed,) = accumulated(events(ask(client, [question], thinking=thinking, tools=[WEATHER], stream=True)))
    assert (streamed["name"], streamed["arguments"]) == (call["function"]["name"], call["function"]["arguments"])
    result = {"role": "tool", "tool_call_id": call["id"], "content": '{"temperature": 21, "condition": "sunny"}'}
    after = ask(client, [question, choice["message"], result], thinking=thinking, tools=[WEATHER])
    assert after["finish_reason"] == "stop"
    assert after["message"]["content"] == "It is 21 degrees and sunny in Paris."


def test_without_a_tool_it_says_that_it_cannot_know(client: httpx.Client) -> None:
    content = ask(client, "What is the weather in Paris?", thinking=False)["message"]["content"]
    assert "no tool" in content


@pytest.mark.parametrize("thinking", [True, False])
def test_json_comes_by_itself_and_a_grammar_leaves_it_as_it_is(client: httpx.Client, thinking: bool) -> None:
    free = ask(client, MARIA, thinking=thinking)["message"]
    held = ask(client, MARIA, thinking=thinking, response_format=FORM)["message"]
    assert json.loads(free["content"]) == json.loads(held["content"]) == {"name": "Maria", "age": 34}
    assert free.get("reasoning") == held.get("reasoning")


def test_a_grammar_turns_an_answer_that_would_not_fit(client: httpx.Client) -> None:
    assert ask(client, "Hello!", thinking=False)["message"]["content"].startswith("Hello")
    choice = ask(client, "Hello!", thinking=False, structured_outputs={"regex": "[0-9]{2}"})
    assert choice["finish_reason"] == "stop" and re.fullmatch("[0-9]{2}", choice["message"]["content"])


def test_letters_are_taken_apart(client: httpx.Client) -> None:
    """Answers in single characters, which the tokenizer would join, read like any other."""
    for question, answer in (
        ('Please repeat: "stone bridge, 4711"', "stone bridge, 4711"),
        ("Write river stone in upper case.", "RIVER STONE"),
        ("Reverse the word stone.", "enots"),
    ):
        assert ask(client, question, thinking=True)["message"]["content"] == answer
