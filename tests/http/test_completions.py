"""/v1/completions: prompts in their four forms, logprobs, choices."""

from __future__ import annotations

from typing import Any

from tests.http.driver import CHAT, COMPLETIONS, HELLO, post, stream
from tests.http.fake_engine import ids, make_server


def texts(events: list[Any], index: int = 0) -> str:
    return "".join(c["text"] for e in events if e != "[DONE]" for c in e["choices"] if c["index"] == index)


def test_whole_answer_has_openai_shape() -> None:
    server = make_server()
    body = post(server.app, COMPLETIONS, prompt="hi").json()
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    assert body["choices"] == [{"index": 0, "text": "Hello world", "logprobs": None, "finish_reason": "stop"}]
    assert server.engine.requests[0].prompt_ids == ids("hi")
    events = stream(server.app, COMPLETIONS, prompt="hi")
    assert events[-1] == "[DONE]"
    assert texts(events) == "Hello world"
    assert events[-2]["choices"][0]["finish_reason"] == "stop"


def test_prompt_takes_text_ids_and_lists_of_them() -> None:
    one, two = ids("one"), ids("two words")
    for prompt, expected in (
        ("one", [one]),
        (["one", "two words"], [one, two]),
        (one, [one]),
        ([one, two], [one, two]),
    ):
        server = make_server(lambda request: ids(f"{len(request.prompt_ids)} {request.choice}"))
        body = post(server.app, COMPLETIONS, prompt=prompt, n=2).json()
        assert [r.prompt_ids for r in server.engine.requests[::2]] == expected
        assert [c["text"] for c in body["choices"]] == [f"{len(p)} {i}" for p in expected for i in range(2)]
        assert body["usage"]["prompt_tokens"] == sum(map(len, expected))
        events = stream(server.app, COMPLETIONS, prompt=prompt, n=2)
        assert [texts(events, c["index"]) for c in body["choices"]] == [c["text"] for c in body["choices"]]


def test_control_tokens_in_a_prompt_count_as_such() -> None:
    server = make_server()
    post(server.app, COMPLETIONS, prompt="<|im_start|>user\nhi<|im_end|>")
    control = server.chat.vocabulary.control
    assert server.engine.requests[0].prompt_ids[0] == control["<|im_start|>"]


def test_thinking_is_plain_text_here() -> None:
    text = "<think>\nhm\n</think>\n\nyes"
    assert post(make_server(lambda r: ids(text)).app, COMPLETIONS, prompt="x").json()["choices"][0]["text"] == text


def test_special_tokens_are_hidden_unless_asked_for() -> None:
    script = lambda request: ids("a<|vision_start|>b")  # noqa: E731
    assert post(make_server(script).app, COMPLETIONS, prompt="x").json()["choices"][0]["text"] == "ab"
    shown = post(make_server(script).app, COMPLETIONS, prompt="x", skip_special_tokens=False)
    assert shown.json()["choices"][0]["text"] == "a<|vision_start|>b"
    end = post(
        make_server(script).app, COMPLETIONS, prompt="x", skip_special_tokens=False, include_stop_str_in_output=True
    )
    assert end.json()["choices"][0]["text"] == "a<|vision_start|>b<|im_end|>"


def test_defaults_come_from_generation_config() -> None:
    server = make_server()
    post(server.app, COMPLETIONS, prompt="x")
    params = server.engine.requests[0].params
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.6, 0.95, 20, 0.0)


def test_logprobs_name_tokens_and_offsets() -> None:
    server = make_server(lambda request: ids("日 yes"))
    whole = post(server.app, COMPLETIONS, prompt="x", logprobs=2).json()["choices"][0]["logprobs"]
    tokens = ids("日 yes")
    assert len(whole["tokens"]) == len(whole["token_logprobs"]) == len(whole["top_logprobs"]) == len(tokens)
    assert whole["tokens"][0].startswith("bytes:\\xe6")
    assert whole["tokens"][-1] == "s" or whole["tokens"][-1].endswith("s")
    assert whole["text_offset"] == sorted(whole["text_offset"])
    assert whole["text_offset"][0] == 0
    assert all(2 <= len(top) <= 3 for top in whole["top_logprobs"])
    events = stream(server.app, COMPLETIONS, prompt="x", logprobs=2)
    parts = [c["logprobs"] for e in events[:-1] for c in e["choices"] if c["logprobs"]]
    for key, values in whole.items():
        assert [v for part in parts for v in part[key]] == values
    zero = post(server.app, COMPLETIONS, prompt="x", logprobs=0).json()["choices"][0]["logprobs"]
    assert [len(top) for top in zero["top_logprobs"]] == [1] * len(tokens)


def test_stop_strings_are_not_seen_before_min_tokens() -> None:
    server = make_server(lambda request: [t for c in "ababab" for t in ids(c)])
    assert post(server.app, COMPLETIONS, prompt="x", stop="b").json()["choices"][0]["text"] == "a"
    assert post(server.app, COMPLETIONS, prompt="x", stop="b", min_tokens=2).json()["choices"][0]["text"] == "aba"


def test_token_ids_are_returned_on_request() -> None:
    server = make_server()
    answer = post(server.app, COMPLETIONS, prompt=["a", "b c"], return_token_ids=True).json()
    for choice, request in zip(answer["choices"], server.engine.requests, strict=True):
        assert choice["prompt_token_ids"] == request.prompt_ids
        assert choice["token_ids"][:-1] == ids("Hello world")
    events = stream(server.app, COMPLETIONS, prompt="a", return_token_ids=True)
    choices = [c for e in events[:-1] for c in e["choices"]]
    assert [c["prompt_token_ids"] for c in choices if "prompt_token_ids" in c] == [ids("a")]
    assert [t for c in choices for t in c.get("token_ids", [])] == answer["choices"][0]["token_ids"]


def test_echo_begins_with_the_prompt_whole_and_streamed() -> None:
    body = post(make_server().app, COMPLETIONS, prompt=["hi <|im_end|>日", "two"], n=2, echo=True).json()
    assert [c["text"] for c in body["choices"]] == ["hi <|im_end|>日Hello world"] * 2 + ["twoHello world"] * 2
    events = stream(make_server().app, COMPLETIONS, prompt=["hi <|im_end|>日", "two"], n=2, echo=True)
    assert [texts(events, i) for i in range(4)] == [c["text"] for c in body["choices"]]


def test_echo_without_output_is_the_prompt_with_its_scores() -> None:
    server = make_server()
    body = post(server.app, COMPLETIONS, prompt="one two", echo=True, max_tokens=0, logprobs=2).json()
    prompt = ids("one two")
    assert server.engine.requests[0].max_tokens == 0
    assert body["usage"]["completion_tokens"] == 0
    (choice,) = body["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("one two", "length")
    scores = choice["logprobs"]
    assert scores["token_logprobs"] == [None, *(-float(i) for i in range(1, len(prompt)))]
    assert scores["top_logprobs"][0] is None and len(scores["top_logprobs"]) == len(prompt)
    assert "".join(scores["tokens"]) == "one two"
    assert [scores["text_offset"][0], len(scores["text_offset"])] == [0, len(prompt)]


def test_echo_joins_the_scores_of_prompt_and_output() -> None:
    whole = post(make_server().app, COMPLETIONS, prompt="one", echo=True, logprobs=1, n=2).json()
    events = stream(make_server().app, COMPLETIONS, prompt="one", echo=True, logprobs=1, n=2)
    for choice in whole["choices"]:
        scores = choice["logprobs"]
        tokens = [*ids("one"), *ids("Hello world")]
        assert len(scores["tokens"]) == len(tokens)
        for offset, token in zip(scores["text_offset"], scores["tokens"], strict=True):
            assert choice["text"][offset:].startswith(token)
        parts = [c["logprobs"] for e in events[:-1] for c in e["choices"] if c["index"] == choice["index"]]
        for key, values in scores.items():
            assert [v for p in parts if p for v in p[key]] == values


def test_prompt_logprobs_in_vllms_shape_for_every_choice() -> None:
    server = make_server()
    body = post(server.app, COMPLETIONS, prompt="one two", prompt_logprobs=1, n=2).json()
    prompt = ids("one two")
    for choice in body["choices"]:
        first, *rest = choice["prompt_logprobs"]
        assert first is None and len(rest) == len(prompt) - 1
        assert rest[0]["0"] == {"logprob": -1.0, "rank": 1, "decoded_token": server.chat.model.decode([0])}
        assert rest[0][str(prompt[1])]["rank"] is None
    chat = post(server.app, CHAT, messages=HELLO, prompt_logprobs=0).json()
    assert len(chat["prompt_logprobs"]) == chat["usage"]["prompt_tokens"]
    assert all(len(entry) == 1 for entry in chat["prompt_logprobs"][1:])
