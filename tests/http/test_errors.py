"""Every refusal: status, code, the field it names, OpenAI's body, and that the server goes on."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.http.driver import CHAT, COMPLETIONS, HELLO, exchange, post
from tests.http.fake_engine import Server, ids, make_server
from tpqwen.engine.protocol import EngineState
from tpqwen.errors import EngineError, Overloaded, RankDied
from tpqwen.request import Delta, FinishReason

JSON_HEADER = {"content-type": "application/json"}


def check_error(answer: httpx.Response, status: int, code: str, param: str | None = None) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    (key, error), *rest = answer.json().items()
    assert key == "error"
    assert not rest
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    if param is not None:
        assert error["param"] == param
    return dict(error)


def still_serves(server: Server) -> None:
    assert not server.engine.live
    assert post(server.app, CHAT, messages=HELLO).status_code == 200


RAW = [
    (b"", 400, "invalid_json"),
    (b"null", 400, "invalid_json"),
    (b"[]", 400, "invalid_json"),
    (b'{"messages": "\xff\xfe"}', 400, "invalid_json"),
    (b'{"max_tokens": ' + b"9" * 5000 + b"}", 400, "invalid_json"),
    (b'{"temperature": NaN}', 400, "invalid_json"),
    (b'{"temperature": -Infinity}', 400, "invalid_json"),
    (b'{"temperature": 1e400}', 400, "invalid_json"),
    (b'{"model": "qwen3-test", "model": "qwen3-test"}', 400, "duplicate_field"),
    (b'{"metadata": {"a": "b", "a": "c"}}', 400, "duplicate_field"),
    (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "invalid_encoding"),
    (b'{"\\udc00": 1}', 400, "invalid_encoding"),
    (b'{"metadata": ' + b"[" * 100 + b"]" * 100 + b"}", 400, "invalid_json"),
    (b'{"metadata": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400, "invalid_json"),
]


@pytest.mark.parametrize(("body", "status", "code"), RAW)
def test_bad_json_is_refused(body: bytes, status: int, code: str) -> None:
    server = make_server()
    check_error(exchange(server.app, "POST", CHAT, content=body, headers=JSON_HEADER), status, code)
    assert not server.engine.requests
    assert server.hooks.named("rejected") == [("invalid",)]
    still_serves(server)


def test_valid_surrogate_pairs_are_text() -> None:
    body = b'{"messages": [{"role": "user", "content": "\\ud83d\\ude00"}]}'
    assert exchange(make_server().app, "POST", CHAT, content=body, headers=JSON_HEADER).status_code == 200


USER = {"role": "user", "content": "x"}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CHAT_ROWS: list[tuple[dict[str, Any], int, str, str]] = [
    ({"messages": None}, 400, "missing_field", "messages"),
    ({"messages": []}, 400, "invalid_value", "messages"),
    ({"messages": "hi"}, 400, "invalid_type", "messages"),
    ({"messages": [USER] * 2049}, 400, "too_many_items", "messages"),
    ({"messages": ["hi"]}, 400, "invalid_type", "messages[0]"),
    ({"messages": [{"content": "x"}]}, 400, "missing_field", "messages[0].role"),
    ({"messages": [{"role": "user"}]}, 400, "missing_field", "messages[0].content"),
    ({"messages": [{"role": "user", "content": 5}]}, 400, "invalid_type", "messages[0].content"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, 400, "invalid_value", "messages[0].role"),
    (
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/"}}]}
            ]
        },
        400,
        "unsupported_content",
        "messages[0].content[0]",
    ),
    ({"messages": [{**USER, "foo": 1}]}, 400, "unknown_parameter", "messages[0].foo"),
    ({"messages": [USER, {"role": "tool", "content": "r"}]}, 400, "missing_field", "messages[1].tool_call_id"),
    ({"messages": [USER, {"role": "tool", "content": "r", "tool_call_id": "c"}]}, 400, "invalid_value", "messages[1]"),
    (
        {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}, USER]},
        400,
        "invalid_value",
        "messages[1].tool_calls",
    ),
    ({"model": "gpt-4"}, 404, "model_not_found", "model"),
    ({"model": 5}, 400, "invalid_type", "model"),
    ({"temperature": "0.5"}, 400, "invalid_type", "temperature"),
    ({"temperature": True}, 400, "invalid_type", "temperature"),
    ({"temperature": -0.1}, 400, "out_of_range", "temperature"),
    ({"temperature": 2.1}, 400, "out_of_range", "temperature"),
    ({"max_tokens": True}, 400, "invalid_type", "max_tokens"),
    ({"max_tokens": 5.0}, 400, "invalid_type", "max_tokens"),
    ({"max_tokens": "5"}, 400, "invalid_type", "max_tokens"),
    ({"max_tokens": 0}, 400, "out_of_range", "max_tokens"),
    ({"max_tokens": 10**30}, 400, "context_length_exceeded", "max_tokens"),
    ({"max_tokens": 512}, 400, "context_length_exceeded", "max_tokens"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, 400, "invalid_value", "max_completion_tokens"),
    ({"max_tokens": 5, "min_tokens": 6}, 400, "invalid_value", "min_tokens"),
    ({"stream": "yes"}, 400, "invalid_type", "stream"),
    ({"stream": 1}, 400, "invalid_type", "stream"),
    ({"top_p": 0}, 400, "out_of_range", "top_p"),
    ({"top_k": -5}, 400, "out_of_range", "top_k"),
    ({"min_p": 1.5}, 400, "out_of_range", "min_p"),
    ({"repetition_penalty": 0}, 400, "out_of_range", "repetition_penalty"),
    ({"n": 10**9}, 400, "out_of_range", "n"),
    ({"n": 0}, 400, "out_of_range", "n"),
    ({"seed": 2**70}, 400, "out_of_range", "seed"),
    ({"logprobs": True, "top_logprobs": 21}, 400, "out_of_range", "top_logprobs"),
    ({"top_logprobs": 2}, 400, "invalid_value", "top_logprobs"),
    ({"logprobs": 2}, 400, "invalid_type", "logprobs"),
    ({"stop": ["a", "b", "c", "d", "e"]}, 400, "too_many_items", "stop"),
    ({"stop": [""]}, 400, "invalid_value", "stop[0]"),
    ({"stop": "x" * 257}, 400, "invalid_value", "stop"),
    ({"stop": [5]}, 400, "invalid_type", "stop[0]"),
    ({"stop_token_ids": [-1]}, 400, "out_of_range", "stop_token_ids[0]"),
    ({"stop_token_ids": [99999]}, 400, "invalid_value", "stop_token_ids"),
    ({"logit_bias": {"999999": 1}}, 400, "invalid_value", "logit_bias"),
    ({"logit_bias": {"x": 1}}, 400, "invalid_value", "logit_bias.x"),
    ({"logit_bias": {"5": 101}}, 400, "out_of_range", "logit_bias.5"),
    ({"logit_bias": {str(i): 0 for i in range(301)}}, 400, "too_many_items", "logit_bias"),
    ({"stream_options": {"include_usage": True}}, 400, "invalid_value", "stream_options"),
    ({"stream": True, "stream_options": {"foo": True}}, 400, "unknown_parameter", "stream_options.foo"),
    ({"response_format": {"type": "yaml"}}, 400, "invalid_value", "response_format.type"),
    ({"response_format": {"type": "json_object"}}, 400, "unsupported_parameter", "response_format"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "http://x/"}}}},
        400,
        "unsupported_schema",
        "response_format.json_schema.schema.$ref",
    ),
    ({"response_format": {}}, 400, "missing_field", "response_format.type"),
    ({"chat_template": "x"}, 400, "unsupported_parameter", "chat_template"),
    ({"chat_template_kwargs": {"tokenize": True}}, 400, "unsupported_parameter", "chat_template_kwargs.tokenize"),
    ({"chat_template_kwargs": {"enable_thinking": 1}}, 400, "invalid_type", "chat_template_kwargs.enable_thinking"),
    ({"audio": {}}, 400, "unsupported_parameter", "audio"),
    ({"tools": []}, 400, "invalid_value", "tools"),
    ({"tool_choice": "auto"}, 400, "invalid_value", "tool_choice"),
    ({"prompt_embeds": "x"}, 400, "unsupported_parameter", "prompt_embeds"),
    ({"echo": True}, 400, "unsupported_parameter", "echo"),
    ({"store": True}, 400, "unsupported_parameter", "store"),
    ({"service_tier": "flex"}, 400, "unsupported_value", "service_tier"),
    ({"prompt": "x"}, 400, "unknown_parameter", "prompt"),
    ({"foo": None}, 400, "unknown_parameter", "foo"),
    ({"x" * 500: 1}, 400, "unknown_parameter", "x" * 64),
    ({"timeout": 0}, 400, "out_of_range", "timeout"),
    ({"cache_salt": "x" * 129}, 400, "invalid_value", "cache_salt"),
    ({"priority": 2**40}, 400, "out_of_range", "priority"),
    ({"truncate_prompt_tokens": 0}, 400, "out_of_range", "truncate_prompt_tokens"),
    ({"user": 5}, 400, "invalid_type", "user"),
]


@pytest.mark.parametrize(("fields", "status", "code", "param"), CHAT_ROWS, ids=lambda v: str(v)[:40])
def test_bad_chat_field_is_refused_by_name(fields: dict[str, Any], status: int, code: str, param: str) -> None:
    server = make_server()
    streams = [{}] if "stream_options" in fields else [{}, {"stream": True}]
    for stream in streams:
        answer = post(server.app, CHAT, **{"messages": HELLO, **stream, **fields})
        assert len(check_error(answer, status, code, param)["message"]) < 300
    assert not server.engine.requests
    assert len(server.hooks.named("rejected")) == len(streams)


COMPLETION_ROWS: list[tuple[dict[str, Any], str, str]] = [
    ({}, "missing_field", "prompt"),
    ({"prompt": ""}, "invalid_value", "prompt"),
    ({"prompt": []}, "invalid_value", "prompt"),
    ({"prompt": [[]]}, "invalid_value", "prompt[0]"),
    ({"prompt": [1, -1]}, "invalid_value", "prompt"),
    ({"prompt": [True]}, "invalid_value", "prompt"),
    ({"prompt": [1.0]}, "invalid_value", "prompt"),
    ({"prompt": [None]}, "invalid_value", "prompt"),
    ({"prompt": [1, "x"]}, "invalid_value", "prompt"),
    ({"prompt": ["x", [1]]}, "invalid_value", "prompt"),
    ({"prompt": [[1], [True]]}, "invalid_value", "prompt[1]"),
    ({"prompt": [99999]}, "invalid_value", "prompt"),
    ({"prompt": [10**25]}, "invalid_value", "prompt"),
    ({"prompt": 5}, "invalid_type", "prompt"),
    ({"prompt": {"a": 1}}, "invalid_type", "prompt"),
    ({"prompt": ["x"] * 65}, "too_many_items", "prompt"),
    ({"prompt": [5] * 600}, "context_length_exceeded", "prompt"),
    ({"prompt": "x", "max_tokens": 0}, "out_of_range", "max_tokens"),
    ({"prompt": "x", "logprobs": 6}, "out_of_range", "logprobs"),
    ({"prompt": "x", "logprobs": True}, "invalid_type", "logprobs"),
    ({"prompt": "x", "suffix": "y"}, "unsupported_parameter", "suffix"),
    ({"prompt": "x", "echo": 1}, "invalid_type", "echo"),
    ({"prompt": "x", "best_of": 2}, "unsupported_parameter", "best_of"),
    ({"prompt": "x", "best_of": 1, "n": 2}, "invalid_value", "best_of"),
    ({"prompt": "x", "prompt_logprobs": 21}, "out_of_range", "prompt_logprobs"),
    ({"prompt": "x", "prompt_logprobs": 1, "stream": True}, "invalid_value", "prompt_logprobs"),
    ({"prompt": "x", "messages": []}, "unknown_parameter", "messages"),
    ({"prompt": "x", "top_logprobs": 1}, "unsupported_parameter", "top_logprobs"),
]


@pytest.mark.parametrize(("fields", "code", "param"), COMPLETION_ROWS, ids=lambda v: str(v)[:40])
def test_bad_completion_field_is_refused_by_name(fields: dict[str, Any], code: str, param: str) -> None:
    server = make_server()
    check_error(post(server.app, COMPLETIONS, **fields), 400, code, param)
    assert not server.engine.requests


def test_too_long_prompt_names_both_numbers() -> None:
    server = make_server()
    error = check_error(post(server.app, COMPLETIONS, prompt=[5] * 600, max_tokens=7), 400, "context_length_exceeded")
    assert all(n in error["message"] for n in ("600", "607", "512"))
    assert server.hooks.named("rejected") == [("too_long",)]
    long = [{"role": "user", "content": "x " * 600}]
    check_error(post(server.app, CHAT, messages=long), 400, "context_length_exceeded", "messages")


def test_messages_do_not_echo_long_input() -> None:
    secret = "s3cret" * 100
    for body in ({"temperature": secret}, {"messages": [{"role": secret, "content": ""}]}, {"model": secret}):
        answer = post(make_server().app, CHAT, **{"messages": HELLO, **body})
        assert "s3cret" * 12 not in answer.text


def test_greedy_choices_are_allowed_and_tiny_temperature_is_greedy() -> None:
    server = make_server()
    assert len(post(server.app, CHAT, messages=HELLO, n=4, temperature=0).json()["choices"]) == 4
    assert post(server.app, CHAT, messages=HELLO, temperature=1e-30).status_code == 200
    assert server.engine.requests[-1].params.greedy


def test_transport_errors_have_the_same_body() -> None:
    server = make_server(max_body_bytes=1000)
    app = server.app
    check_error(exchange(app, "POST", CHAT, content=b"x" * 1001, headers=JSON_HEADER), 413, "request_too_large")
    assert exchange(app, "POST", CHAT, content=b"x" * 1001, headers=JSON_HEADER).headers["connection"] == "close"
    check_error(
        exchange(app, "POST", CHAT, content=b"{}", headers={"content-type": "text/plain"}),
        415,
        "unsupported_media_type",
    )
    check_error(exchange(app, "POST", CHAT, content=b"{}"), 415, "unsupported_media_type")
    check_error(
        exchange(app, "POST", CHAT, content=b"{}", headers={**JSON_HEADER, "content-encoding": "gzip"}),
        415,
        "unsupported_media_type",
    )
    answer = exchange(app, "GET", CHAT)
    check_error(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"
    answer = exchange(app, "DELETE", "/health")
    check_error(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == "GET, HEAD"
    check_error(exchange(app, "GET", "/v1/nothing"), 404, "not_found")
    check_error(exchange(app, "GET", "/v1/"), 404, "not_found")
    assert ("other", "GET", 404) in server.hooks.named("http")
    still_serves(server)


def test_chunked_body_over_the_limit_is_refused() -> None:
    async def chunks() -> Any:
        for _ in range(20):
            yield b" " * 100

    server = make_server(max_body_bytes=1000)
    check_error(exchange(server.app, "POST", CHAT, content=chunks(), headers=JSON_HEADER), 413, "request_too_large")


@pytest.mark.parametrize("name", ["x-request-timeout-seconds", "x-request-disconnect-disabled"])
def test_headers_that_steer_the_proxy_are_refused(name: str) -> None:
    server = make_server()
    answer = exchange(server.app, "POST", CHAT, json={"messages": HELLO}, headers={name: "1"})
    check_error(answer, 400, "forbidden_header", name)
    assert not server.engine.requests


def test_overload_is_told_with_a_time_to_retry() -> None:
    for stream in (False, True):
        server = make_server(lambda request: [Overloaded("512 requests wait", code="queue_full", retry_after_s=1.2)])
        answer = post(server.app, CHAT, messages=HELLO, stream=stream)
        error = check_error(answer, 429, "queue_full")
        assert error["type"] == "rate_limit_exceeded"
        assert answer.headers["retry-after"] == "2"
        assert server.hooks.named("rejected") == [("queue_full",)]
        assert not server.hooks.named("accepted")
        assert not server.hooks.named("finished")


def test_overload_of_one_choice_refuses_the_whole_request() -> None:
    def script(request: Any) -> list[Any]:
        return [Overloaded("full", code="queue_full")] if request.choice == 1 else [0.01, *ids("Hello world")]

    server = make_server(script)
    check_error(post(server.app, CHAT, messages=HELLO, n=3), 429, "queue_full")
    assert not server.engine.live


@pytest.mark.parametrize(
    ("name", "code", "retry"),
    [("loading", "loading", "1"), ("draining", "draining", "1"), ("dead", "engine_dead", None)],
)
def test_server_that_takes_nothing_says_why(name: str, code: str, retry: str | None) -> None:
    server = make_server()
    server.engine.current = EngineState(name, "rank 1 is gone")
    answer = post(server.app, CHAT, messages=HELLO)
    error = check_error(answer, 503, code)
    assert error["type"] == "server_error"
    assert "rank 1 is gone" in error["message"]
    assert answer.headers.get("retry-after") == retry
    assert not server.engine.requests


def test_degraded_engine_still_takes_requests() -> None:
    server = make_server()
    server.engine.current = EngineState("degraded", "rank 1 restarting")
    assert post(server.app, CHAT, messages=HELLO).status_code == 200


def failed_delta(code: str | None) -> Delta:
    return Delta(
        id="x", index=0, token_ids=[], finish_reason=FinishReason.ERROR, error="NaN in the row", error_code=code
    )


@pytest.mark.parametrize(
    ("item", "status", "code"),
    [
        (EngineError("it broke"), 500, "internal"),
        (RankDied("rank 1 died", rank=1), 503, "rank_dead"),
        (failed_delta("numerical_error"), 500, "numerical_error"),
        (failed_delta("queue_timeout"), 503, "queue_timeout"),
        (failed_delta(None), 500, "internal"),
        (ValueError("secret /path"), 500, "internal"),
    ],
    ids=str,
)
def test_engine_failures_become_errors(item: Any, status: int, code: str) -> None:
    server = make_server(lambda request: [item])
    answer = post(server.app, CHAT, messages=HELLO)
    error = check_error(answer, status, code)
    assert error["type"] == "server_error"
    assert "secret" not in answer.text
    assert answer.headers.get("x-should-retry") == ("false" if code == "numerical_error" else None)
    assert not server.engine.live
    if isinstance(item, ValueError):
        assert answer.headers["x-request-id"] in error["message"]
    else:
        assert [f.reason for (f,) in server.hooks.named("finished")] == ["error"]


def test_lost_or_doubled_tokens_are_noticed() -> None:
    token = ids("a")[0]
    script = [token, Delta(id="x", index=5, token_ids=[token])]
    check_error(post(make_server(lambda request: script).app, CHAT, messages=HELLO), 500, "internal")


def test_body_is_json_without_content_length_too() -> None:
    async def body() -> Any:
        yield json.dumps({"messages": HELLO}).encode()

    assert exchange(make_server().app, "POST", CHAT, content=body(), headers=JSON_HEADER).status_code == 200
