"""Chat prompts: variants, messages as the template needs them, control tokens that stay text."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.text_fixture import MARKS, SPECIAL, tokenizer
from tpqwen.errors import RequestError
from tpqwen.text.chat import ChatFormat, GenerationDefaults, SamplingDefaults, Variant
from tpqwen.text.thinking import State

FORMAT = ChatFormat(tokenizer())
VARIANTS = ["hybrid", "thinking", "non-thinking", "instruct", "coder", "base"]
USER = {"role": "user", "content": "Q"}


def rendered(*messages: dict[str, Any], thinking: bool | None = None, chat: ChatFormat = FORMAT) -> str:
    return tokenizer().decode(chat.prompt(list(messages), thinking).ids, skip_special_tokens=False)


def refusal(*messages: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        FORMAT.prompt(list(messages))
    return caught.value


def call(call_id: str, x: int) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": "f", "arguments": f'{{"x":{x}}}'}}


def result(call_id: str, content: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": content}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_is_detected_from_the_template(variant: str) -> None:
    assert ChatFormat(tokenizer(variant)).variant == Variant(variant)


def test_start_state_and_mode_follow_the_rendered_prompt() -> None:
    expected = {
        ("hybrid", None): (State.UNDECIDED, True),
        ("hybrid", True): (State.UNDECIDED, True),
        ("hybrid", False): (State.CONTENT, False),
        ("thinking", None): (State.REASONING, True),
        ("non-thinking", None): (State.CONTENT, False),
        ("instruct", None): (State.UNDECIDED, False),
        ("coder", False): (State.UNDECIDED, False),
    }
    for (variant, thinking), (start, thinks) in expected.items():
        prompt = ChatFormat(tokenizer(variant)).prompt([USER], thinking)
        assert (prompt.start, prompt.thinking) == (start, thinks), variant


def test_model_without_template_refuses_chat() -> None:
    with pytest.raises(RequestError, match="no chat template"):
        ChatFormat(tokenizer("base")).prompt([USER])


def test_sampling_defaults_follow_the_mode() -> None:
    thinking, answering = SamplingDefaults(0.6, 0.95, 20), SamplingDefaults(0.7, 0.8, 20)
    assert FORMAT.defaults(True) == thinking
    assert FORMAT.defaults(False) == answering
    assert FORMAT.defaults(None) == SamplingDefaults()
    own = GenerationDefaults(temperature=0.9, repetition_penalty=1.05)
    hybrid, instruct = (ChatFormat(tokenizer(v), own) for v in ("hybrid", "instruct"))
    assert hybrid.defaults(True) == SamplingDefaults(0.9, 0.95, 20, 0.0, 1.05)
    assert hybrid.defaults(False) == answering
    assert instruct.defaults(False) == SamplingDefaults(0.9, 0.8, 20, 0.0, 1.05)
    assert instruct.defaults(None) == SamplingDefaults(0.9, 1.0, 0, 0.0, 1.05)


def test_generation_prompt_by_mode() -> None:
    plain = "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    assert rendered(USER) == rendered(USER, thinking=True) == plain
    assert rendered(USER, thinking=False) == plain + "<think>\n\n</think>\n\n"


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "Hello "}, {"type": "text", "text": "world"}]
    for role in ("system", "user", "assistant"):
        split, whole = ({"role": role, "content": c} for c in (parts, "Hello world"))
        assert rendered(split, USER) == rendered(whole, USER)
        assert "Hello world" in rendered(split, USER)


def test_null_content_and_developer_role_are_normalised() -> None:
    assert rendered(USER, {"role": "assistant", "content": None}, USER) == rendered(
        USER, {"role": "assistant", "content": ""}, USER
    )
    assert rendered({"role": "developer", "content": "D"}, USER) == rendered({"role": "system", "content": "D"}, USER)


def test_reasoning_is_read_under_both_names_and_from_the_content() -> None:
    forms = [
        {"role": "assistant", "content": "A", "reasoning_content": "R"},
        {"role": "assistant", "content": "A", "reasoning": "R"},
        {"role": "assistant", "content": "<think>\nR\n</think>\n\nA"},
    ]
    prompts = [rendered(USER, form) for form in forms]
    assert len(set(prompts)) == 1
    assert "<think>\nR\n</think>\n\nA<|im_end|>" in prompts[0]
    assert {rendered(USER, form, USER).count("R") for form in forms} == {0}
    assert tokenizer().vocabulary.control["<think>"] in FORMAT.prompt([USER, forms[2]]).ids


def test_tool_turns_render_as_in_training() -> None:
    turn = {"role": "assistant", "content": None, "reasoning_content": "R", "tool_calls": [call("a", 1), call("b", 2)]}
    expected = (
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n<think>\nR\n</think>\n\n"
        '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>\n'
        '<tool_call>\n{"name": "f", "arguments": {"x": 2}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert rendered(USER, turn, result("a", "1"), result("b", "2")) == expected
    assert rendered(USER, turn, result("b", "2"), result("a", "1")) == expected


@pytest.mark.parametrize(
    ("results", "param"),
    [
        ([], "messages[1].tool_calls"),
        ([result("a", "1")], "messages[1].tool_calls"),
        ([result("a", "1"), result("c", "2")], "messages[3].tool_call_id"),
        ([result("a", "1"), result("a", "2")], "messages[3].tool_call_id"),
    ],
)
def test_tool_results_must_match_the_calls(results: list[dict[str, Any]], param: str) -> None:
    turn = {"role": "assistant", "tool_calls": [call("a", 1), call("b", 2)]}
    assert refusal(USER, turn, *results).param == param


def test_arguments_must_be_a_json_object() -> None:
    for arguments in ("{", "[]", "5"):
        bad = {"id": "a", "function": {"name": "f", "arguments": arguments}}
        error = refusal(USER, {"role": "assistant", "tool_calls": [bad]}, result("a", "1"))
        assert error.param == "messages[1].tool_calls[0].function.arguments"


def test_empty_fields_of_the_official_client_are_taken() -> None:
    dumped = {
        "role": "assistant",
        "content": "A",
        "refusal": None,
        "annotations": [],
        "tool_calls": None,
        "audio": None,
    }
    assert "A" in rendered(USER, dumped, USER)
    assert refusal(USER, {**dumped, "audio": {"id": "x"}}).code == "unsupported_parameter"


@pytest.mark.parametrize("token", [*SPECIAL, *MARKS])
@pytest.mark.parametrize("role", ["system", "user", "tool"])
def test_typed_control_tokens_stay_text(token: str, role: str) -> None:
    def messages(content: str) -> list[dict[str, Any]]:
        if role != "tool":
            return [{"role": role, "content": content}, USER]
        return [USER, {"role": "assistant", "tool_calls": [call("a", 1)]}, result("a", content)]

    typed, harmless = (FORMAT.prompt(messages(f"x{t}y")).ids for t in (token, "z"))
    control = set(tokenizer().vocabulary.control.values())
    assert [i for i in typed if i in control] == [i for i in harmless if i in control]
    assert f"x{token}y" in tokenizer().decode(typed, skip_special_tokens=False)


def test_assistant_cannot_end_its_turn_but_keeps_its_marks() -> None:
    control = tokenizer().vocabulary.control
    ids = FORMAT.prompt([USER, {"role": "assistant", "content": "<tool_call>x</tool_call><|im_end|>"}, USER]).ids
    assert ids.count(control["<tool_call>"]) == ids.count(control["</tool_call>"]) == 1
    assert ids.count(control["<|im_end|>"]) == 3


def test_user_text_in_a_tool_response_block_is_no_query() -> None:
    turn = {"role": "assistant", "content": "A", "reasoning_content": "R"}
    wrapped = {"role": "user", "content": "<tool_response>\nx\n</tool_response>"}
    assert "<think>\nR\n</think>" in rendered(USER, turn, wrapped)
    assert "R" not in rendered(USER, turn, {"role": "user", "content": "x"})


snippets = st.lists(
    st.sampled_from([*SPECIAL, *MARKS, "<|im_", "end|>", "<", "a b", "\n", "é", "e\u0301", "日"]), max_size=8
)


@given(texts=st.lists(snippets.map("".join), min_size=1, max_size=4))
@settings(max_examples=150, deadline=None)
def test_ids_without_typed_controls_equal_plain_encoding(texts: list[str]) -> None:
    messages = [{"role": "user", "content": t} for t in texts]
    ids = FORMAT.prompt(messages).ids
    control = tokenizer().vocabulary.control
    by_hand: list[int] = []
    for text in texts:
        by_hand += [control["<|im_start|>"], *tokenizer().encode_plain(f"user\n{text}"), control["<|im_end|>"]]
        by_hand += tokenizer().encode_plain("\n")
    assert ids == [*by_hand, control["<|im_start|>"], *tokenizer().encode_plain("assistant\n")]


def test_noncharacters_in_the_text_are_kept() -> None:
    text = "\ufdd0\ufdd1<|im_end|>\ufdd2"
    assert text in rendered({"role": "user", "content": text})
    every = "".join(map(chr, range(0xFDD0, 0xFDF0)))
    assert refusal({"role": "user", "content": every + "<|im_end|>"}).code == "invalid_value"
    assert every in rendered({"role": "user", "content": every})
