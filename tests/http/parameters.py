"""One row for each parameter of each endpoint: a value that acts, how that shows, and a value that is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.http.driver import HELLO, events
from tests.http.fake_engine import Server, ids
from tpqwen.request import GenerateRequest, SamplingParams


@dataclass(frozen=True)
class Seen:
    """What came of a request with the parameter."""

    server: Server
    answer: httpx.Response

    @property
    def request(self) -> GenerateRequest:
        """The engine's first request with the parameter."""
        return self.server.engine.requests[0]

    @property
    def requests(self) -> list[GenerateRequest]:
        return self.server.engine.requests

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def body(self) -> Any:
        return self.answer.json()

    @property
    def choice(self) -> Any:
        return self.body["choices"][0]

    @property
    def events(self) -> list[Any]:
        return events(self.answer.text)

    @property
    def text(self) -> str:
        """The first choice's text, whichever endpoint."""
        return str(self.choice["message"]["content"] if "message" in self.choice else self.choice["text"])


@dataclass(frozen=True)
class Row:
    """also: fields that the parameter needs beside it. bad: a value that is refused by its name. said: by the model."""

    value: Any
    acts: Callable[[Seen], bool]
    bad: Any
    also: dict[str, Any] = field(default_factory=dict)
    status: int = 400
    said: str = "Hello world"


WEATHER = {"name": "weather", "parameters": {"type": "object", "properties": {"place": {"type": "string"}}}}
TOOL = {"type": "function", "function": WEATHER}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"place": "here"}}\n</tool_call>'
SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}}


def _same_text(seen: Seen) -> bool:
    """Accepted and asking for nothing."""
    return seen.answer.status_code == 200 and seen.text == "Hello world"


def _prompt_has(seen: Seen, text: str) -> bool:
    return text in seen.server.chat.model.decode(seen.request.prompt_ids, skip_special_tokens=False)


COMMON: dict[str, Row] = {
    "model": Row("qwen3-test", lambda s: s.body["model"] == "qwen3-test", "gpt-4", status=404),
    "temperature": Row(0.3, lambda s: s.params.temperature == 0.3, 2.1),
    "top_p": Row(0.4, lambda s: s.params.top_p == 0.4, 0),
    "top_k": Row(-1, lambda s: s.params.top_k == 0, -2),
    "min_p": Row(0.1, lambda s: s.params.min_p == 0.1, 1.5),
    "presence_penalty": Row(-2, lambda s: s.params.presence_penalty == -2.0, 2.5),
    "frequency_penalty": Row(1.5, lambda s: s.params.frequency_penalty == 1.5, -3),
    "repetition_penalty": Row(1.1, lambda s: s.params.repetition_penalty == 1.1, 0),
    "logit_bias": Row({"7": -100}, lambda s: s.params.logit_bias == {7: -100.0}, {"99999": 1}),
    "seed": Row(-5, lambda s: s.request.seed == 2**64 - 5, 2**70),
    "n": Row(3, lambda s: [r.choice for r in s.requests] == [0, 1, 2] and len(s.body["choices"]) == 3, 17),
    "min_tokens": Row(2, lambda s: s.params.min_tokens == 2, -1),
    "ignore_eos": Row(True, lambda s: s.request.end_ids == (), 1, {"max_tokens": 3}),
    "include_stop_str_in_output": Row(True, lambda s: s.text == "Hello wor", "yes", {"stop": "wor"}),
    "skip_special_tokens": Row(False, lambda s: not s.params.skip_special_tokens, 0),
    "stop": Row(["wor", "x"], lambda s: s.text == "Hello " and s.choice["finish_reason"] == "stop", ["a"] * 5),
    "stop_token_ids": Row([7], lambda s: 7 in s.request.end_ids, [99999]),
    "stream": Row(True, lambda s: s.events[-1] == "[DONE]", "yes"),
    "stream_options": Row(
        {"include_usage": True}, lambda s: s.events[-2]["usage"]["completion_tokens"] > 0, {"foo": 1}, {"stream": True}
    ),
    "priority": Row(-3, lambda s: s.request.priority == -3, 2**40),
    "cache_salt": Row("pepper", lambda s: s.request.cache_salt == "pepper", ""),
    "prompt_logprobs": Row(1, lambda s: "prompt_logprobs" in s.answer.text and s.params.prompt_logprobs == 1, 21),
    "truncate_prompt_tokens": Row(2, lambda s: len(s.request.prompt_ids) == 2, 0),
    "return_token_ids": Row(True, lambda s: s.choice["token_ids"][:-1] == ids("Hello world"), "x"),
    "timeout": Row(60, _same_text, 0),
    "user": Row("me", _same_text, 5),
    "metadata": Row({"a": "b"}, _same_text, {"a": 1}),
    "store": Row(False, _same_text, True),
    "service_tier": Row("auto", _same_text, "flex"),
    "max_tokens": Row(2, lambda s: s.request.max_tokens == 2 and s.choice["finish_reason"] == "length", 10**9),
}

COMMON |= {
    "response_format": Row(
        {"type": "json_object"},
        lambda s: s.request.guide is not None and s.request.guide.answer != b"",
        {"type": "yaml"},
    ),
    "structured_outputs": Row(
        {"choice": ["a", "b"]}, lambda s: s.request.guide is not None and s.request.guide.answer != b"", {"choice": []}
    ),
}

_GOING_ON = [*HELLO, {"role": "assistant", "content": "Good"}]

CHAT_ROWS: dict[str, Row] = COMMON | {
    "messages": Row(HELLO, _same_text, []),
    "max_completion_tokens": Row(2, lambda s: s.request.max_tokens == 2, 0),
    "logprobs": Row(True, lambda s: len(s.choice["logprobs"]["content"]) == len(ids("Hello world")), 1),
    "top_logprobs": Row(
        2, lambda s: len(s.choice["logprobs"]["content"][0]["top_logprobs"]) == 2, 21, {"logprobs": True}
    ),
    "chat_template_kwargs": Row({"enable_thinking": False}, lambda s: s.params.temperature == 0.7, {"tokenize": True}),
    "add_generation_prompt": Row(False, lambda s: s.request.prompt_ids == ids("<|im_start|>user\nhi<|im_end|>\n"), 0),
    "continue_final_message": Row(
        True, lambda s: s.request.prompt_ids[-len(ids("Good")) :] == ids("Good"), "x", {"messages": _GOING_ON}
    ),
    "reasoning_effort": Row("low", lambda s: s.request.thinking.tokens == 2048, "huge"),
    "thinking_token_budget": Row(7, lambda s: s.request.thinking.tokens == 7, 0),
    "tools": Row(
        [TOOL],
        lambda s: len(s.choice["message"]["tool_calls"]) == 2 and _prompt_has(s, "weather"),
        [5],
        said=CALL + CALL,
    ),
    "tool_choice": Row("none", lambda s: not _prompt_has(s, "weather"), "some", {"tools": [TOOL]}),
    "parallel_tool_calls": Row(
        False, lambda s: len(s.choice["message"]["tool_calls"]) == 1, 0, {"tools": [TOOL]}, said=CALL + CALL
    ),
}

COMPLETION_ROWS: dict[str, Row] = COMMON | {
    "prompt": Row(["a", "b"], lambda s: len(s.body["choices"]) == 2, []),
    "best_of": Row(2, lambda s: len(s.body["choices"]) == 2, 3, {"n": 2}),
    "echo": Row(True, lambda s: s.text == "hiHello world", 1),
    "logprobs": Row(1, lambda s: len(s.choice["logprobs"]["tokens"]) == len(ids("Hello world")), 6),
}

TOKENIZE_ROWS: dict[str, Row] = {
    "model": Row("qwen3-test", lambda s: s.body["tokens"] == ids("hi"), "gpt-4", status=404),
    "prompt": Row("there", lambda s: s.body["tokens"] == ids("there"), 5),
    "messages": Row(HELLO, lambda s: s.body["tokens"][0] == ids("<|im_start|>")[0], [], {"prompt": None}),
    "chat_template_kwargs": Row(
        {"enable_thinking": False},
        lambda s: s.body["tokens"][-len(ids("</think>\n\n")) :] == ids("</think>\n\n"),
        {"x": 1},
        {"prompt": None, "messages": HELLO},
    ),
    "add_generation_prompt": Row(
        False, lambda s: s.body["tokens"][-2:] == ids("<|im_end|>\n"), 0, {"prompt": None, "messages": HELLO}
    ),
    "continue_final_message": Row(
        True,
        lambda s: s.body["tokens"][-len(ids("Good")) :] == ids("Good"),
        "x",
        {"prompt": None, "messages": _GOING_ON},
    ),
    "reasoning_effort": Row(
        "none",
        lambda s: s.body["tokens"][-len(ids("</think>\n\n")) :] == ids("</think>\n\n"),
        "huge",
        {"prompt": None, "messages": HELLO},
    ),
    "tools": Row([TOOL], lambda s: len(s.body["tokens"]) > 60, [5], {"prompt": None, "messages": HELLO}),
    "return_token_strs": Row(True, lambda s: "".join(s.body["token_strs"]) == "hi", 1),
}

DETOKENIZE_ROWS: dict[str, Row] = {
    "model": Row("qwen3-test", lambda s: s.body["prompt"] == "hi", "gpt-4", status=404),
    "tokens": Row(ids("there"), lambda s: s.body["prompt"] == "there", [99999]),
}


def _said(seen: Seen) -> bool:
    """A response or a message whose text is the whole of it."""
    body = seen.body
    content = body["output"][0]["content"] if "output" in body else body["content"]
    return seen.answer.status_code == 200 and content[0]["text"] == "Hello world"


_TURN = "<|im_start|>user\nhi<|im_end|>\n"
_SAMPLING = {name: COMMON[name] for name in ("temperature", "top_p")}

_OPENAI_TOOL = {"type": "function", **WEATHER}
_ANTHROPIC_TOOL = {"name": "weather", "input_schema": WEATHER["parameters"]}

RESPONSES_ROWS: dict[str, Row] = _SAMPLING | {
    "input": Row([{"role": "user", "content": "ho"}], lambda s: _prompt_has(s, "user\nho<|im_end|>"), []),
    "model": Row("qwen3-test", _said, "gpt-4", status=404),
    "instructions": Row("Be brief", lambda s: _prompt_has(s, "system\nBe brief<|im_end|>"), 5),
    "max_output_tokens": Row(
        2, lambda s: s.request.max_tokens == 2 and s.body["incomplete_details"]["reason"] == "max_output_tokens", 0
    ),
    "stream": Row(True, lambda s: s.events[-1]["type"] == "response.completed", 1),
    "tools": Row(
        [_OPENAI_TOOL], lambda s: [i["type"] for i in s.body["output"]] == ["function_call"] * 2, [5], said=CALL + CALL
    ),
    "tool_choice": Row("none", lambda s: not _prompt_has(s, "weather"), 5, {"tools": [_OPENAI_TOOL]}),
    "parallel_tool_calls": Row(
        False, lambda s: len(s.body["output"]) == 1, 1, {"tools": [_OPENAI_TOOL]}, said=CALL + CALL
    ),
    "text": Row(
        {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}},
        lambda s: s.request.guide is not None and s.body["text"]["format"]["name"] == "n",
        {"format": {"type": "yaml"}},
    ),
    "reasoning": Row({"effort": "low"}, lambda s: s.request.thinking.tokens == 2048, {"effort": "huge"}),
    "include": Row(
        ["message.output_text.logprobs"],
        lambda s: len(s.body["output"][0]["content"][0]["logprobs"]) == len(ids("Hello world")),
        ["reasoning.encrypted_content"],
    ),
    "top_logprobs": Row(
        2,
        lambda s: len(s.body["output"][0]["content"][0]["logprobs"][0]["top_logprobs"]) == 2,
        21,
        {"include": ["message.output_text.logprobs"]},
    ),
    "truncation": Row("disabled", _said, "auto"),
    "user": Row("me", _said, 5),
    "metadata": Row({"a": "b"}, lambda s: _said(s) and s.body["metadata"] == {"a": "b"}, {"a": 1}),
    "store": Row(False, _said, True),
    "service_tier": Row("auto", _said, "flex"),
}

COUNT_ROWS: dict[str, Row] = {
    "messages": Row(HELLO, lambda s: s.body["input_tokens"] == len(ids(f"{_TURN}<|im_start|>assistant\n")), []),
    "model": Row("qwen3-test", lambda s: s.body["input_tokens"] > 3, "claude", status=404),
    "system": Row(
        [{"type": "text", "text": "Be brief"}],
        lambda s: s.body["input_tokens"] > len(ids(f"{_TURN}<|im_start|>assistant\n")) + 4,
        5,
    ),
    "tools": Row([_ANTHROPIC_TOOL], lambda s: s.body["input_tokens"] > 60, [5]),
    "tool_choice": Row(
        {"type": "none"}, lambda s: s.body["input_tokens"] < 60, {"type": "all"}, {"tools": [_ANTHROPIC_TOOL]}
    ),
    "thinking": Row(
        {"type": "disabled"},
        lambda s: s.body["input_tokens"] > len(ids(f"{_TURN}<|im_start|>assistant\n")) + 2,
        {"type": "enabled"},
    ),
    "output_config": Row({}, lambda s: s.body["input_tokens"] > 3, {"format": {"type": "yaml"}}),
}

MESSAGES_ROWS: dict[str, Row] = _SAMPLING | {
    "messages": Row(
        [*HELLO, {"role": "assistant", "content": "Good"}],
        lambda s: s.request.prompt_ids[-len(ids("Good")) :] == ids("Good"),
        [],
    ),
    "model": Row("qwen3-test", _said, "claude", status=404),
    "system": Row("Be brief", lambda s: _prompt_has(s, "system\nBe brief<|im_end|>"), 5),
    "max_tokens": Row(2, lambda s: s.request.max_tokens == 2 and s.body["stop_reason"] == "max_tokens", 0),
    "top_k": Row(5, lambda s: s.params.top_k == 5, -2),
    "stop_sequences": Row(
        ["wor"], lambda s: (s.body["stop_reason"], s.body["stop_sequence"]) == ("stop_sequence", "wor"), "wor"
    ),
    "stream": Row(True, lambda s: s.events[-1] == {"type": "message_stop"}, 1),
    "tools": Row(
        [_ANTHROPIC_TOOL],
        lambda s: (
            [b["input"] for b in s.body["content"]] == [{"place": "here"}] * 2 and s.body["stop_reason"] == "tool_use"
        ),
        [5],
        said=CALL + CALL,
    ),
    "tool_choice": Row(
        {"type": "auto", "disable_parallel_tool_use": True},
        lambda s: len(s.body["content"]) == 1,
        {"type": "all"},
        {"tools": [_ANTHROPIC_TOOL]},
        said=CALL + CALL,
    ),
    "thinking": Row(
        {"type": "enabled", "budget_tokens": 9}, lambda s: s.request.thinking.tokens == 9, {"type": "enabled"}
    ),
    "output_config": Row(
        {"effort": "low", "format": {"type": "json_schema", "schema": SCHEMA}},
        lambda s: s.request.thinking.tokens == 2048 and s.request.guide is not None,
        {"format": {"type": "yaml"}},
    ),
    "metadata": Row({"user_id": "me"}, _said, {"foo": 1}),
    "service_tier": Row("standard_only", _said, "flex"),
}

_POOLED: dict[str, Row] = {
    "model": Row("qwen3-test", lambda s: s.body["model"] == "qwen3-test", "gpt-4", status=404),
    **{name: COMMON[name] for name in ("priority", "cache_salt")},
    "timeout": Row(60, lambda s: s.answer.status_code == 200, 0),
    "user": Row("me", lambda s: s.answer.status_code == 200, 5),
}

EMBEDDINGS_ROWS: dict[str, Row] = _POOLED | {
    "input": Row(["a", "b"], lambda s: [e["index"] for e in s.body["data"]] == [0, 1], []),
    "encoding_format": Row("base64", lambda s: len(s.body["data"][0]["embedding"]) == 24, "hex"),
    "dimensions": Row(2, lambda s: len(s.body["data"][0]["embedding"]) == 2, 5),
    "truncate_prompt_tokens": Row(1, lambda s: len(s.request.prompt_ids) == 1, 0),
}

RERANK_ROWS: dict[str, Row] = _POOLED | {
    "query": Row("really?", lambda s: _prompt_has(s, "<Query>: really?\n"), ""),
    "documents": Row(["a", {"text": "b"}], lambda s: len(s.body["results"]) == 2, []),
    "instruction": Row("judge", lambda s: _prompt_has(s, "<Instruct>: judge\n"), 5),
    "top_n": Row(1, lambda s: len(s.body["results"]) == 1, 0),
    "return_documents": Row(False, lambda s: "document" not in s.body["results"][0], 1),
}

# path -> (what every request has, its rows)
TABLES: dict[str, tuple[dict[str, Any], dict[str, Row]]] = {
    "/v1/chat/completions": ({"messages": HELLO}, CHAT_ROWS),
    "/v1/completions": ({"prompt": "hi"}, COMPLETION_ROWS),
    "/v1/responses": ({"input": "hi"}, RESPONSES_ROWS),
    "/v1/messages": ({"messages": HELLO, "max_tokens": 200}, MESSAGES_ROWS),
    "/v1/messages/count_tokens": ({"messages": HELLO}, COUNT_ROWS),
    "/v1/embeddings": ({"input": "hi"}, EMBEDDINGS_ROWS),
    "/v1/rerank": ({"query": "q", "documents": ["a", "b"]}, RERANK_ROWS),
    "/tokenize": ({"prompt": "hi"}, TOKENIZE_ROWS),
    "/detokenize": ({"tokens": ids("hi")}, DETOKENIZE_ROWS),
}
