"""/tokenize and /detokenize."""

from __future__ import annotations

from tests.http.driver import HELLO, post
from tests.http.fake_engine import MAX_MODEL_LEN, ids, make_server
from tests.http.test_errors import check_error

TOKENIZE, DETOKENIZE = "/tokenize", "/detokenize"


def test_text_and_back() -> None:
    app = make_server().app
    text = "Hello 日本 👩‍👩‍👧‍👦 <|im_end|>"
    answer = post(app, TOKENIZE, prompt=text, return_token_strs=True).json()
    assert answer["tokens"] == ids(text)
    assert (answer["count"], answer["max_model_len"]) == (len(ids(text)), MAX_MODEL_LEN)
    assert len(answer["token_strs"]) == answer["count"] and answer["token_strs"][-1] == "<|im_end|>"
    assert post(app, DETOKENIZE, tokens=answer["tokens"]).json() == {"prompt": text}
    assert post(app, DETOKENIZE, tokens=[]).json() == {"prompt": ""}


def test_messages_are_what_a_chat_completion_would_send() -> None:
    server = make_server()
    options = {"chat_template_kwargs": {"enable_thinking": False}}
    post(server.app, "/v1/chat/completions", messages=HELLO, **options)
    answer = post(server.app, TOKENIZE, messages=HELLO, **options).json()
    assert answer["tokens"] == server.engine.requests[0].prompt_ids
    assert "token_strs" not in answer
    bare = post(server.app, TOKENIZE, messages=HELLO, add_generation_prompt=False).json()["tokens"]
    assert bare == ids("<|im_start|>user\nhi<|im_end|>\n")
    more = [*HELLO, {"role": "assistant", "content": "He"}]
    going_on = post(server.app, TOKENIZE, messages=more, continue_final_message=True).json()["tokens"]
    assert going_on[-len(ids("He")) :] == ids("He")


def test_any_length_is_counted() -> None:
    answer = post(make_server().app, TOKENIZE, prompt="x " * 20_000).json()
    assert answer["count"] == len(answer["tokens"]) >= 20_000


def test_bad_requests_are_refused_by_name() -> None:
    server = make_server()
    for body, code, param in (
        ({}, "missing_field", "prompt"),
        ({"prompt": "x", "messages": HELLO}, "missing_field", "prompt"),
        ({"prompt": "x", "add_generation_prompt": False}, "invalid_value", "add_generation_prompt"),
        ({"prompt": 5}, "invalid_type", "prompt"),
        ({"messages": []}, "invalid_value", "messages"),
        ({"prompt": "x", "foo": 1}, "unknown_parameter", "foo"),
    ):
        check_error(post(server.app, TOKENIZE, **body), 400, code, param)
    for body, code, param in (
        ({}, "missing_field", "tokens"),
        ({"tokens": [-1]}, "out_of_range", "tokens[0]"),
        ({"tokens": [10**30]}, "invalid_value", "tokens"),
        ({"tokens": [True]}, "invalid_type", "tokens[0]"),
    ):
        check_error(post(server.app, DETOKENIZE, **body), 400, code, param)
    check_error(post(server.app, DETOKENIZE, tokens=[1], model="x"), 404, "model_not_found", "model")
