"""Tool calls in the output: both forms, streamed arguments, what is no call, and independence of the cutting."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.control.test_thinking import END, VOCABULARY, cut_deltas
from tests.text_fixture import tokenizer
from tpqwen.request import FinishReason, SamplingParams
from tpqwen.text.call_pieces import CallParser
from tpqwen.text.calls import merged
from tpqwen.text.chat import ChatFormat
from tpqwen.text.coder_xml import CoderCall, converted, types_of
from tpqwen.text.hermes import HermesCall
from tpqwen.text.pipeline import OutputText, TextDelta
from tpqwen.text.thinking import State
from tpqwen.text.tools import CallFormat, CallSyntax, Tools, call_syntax, detect_format

OPEN, CLOSE = VOCABULARY.control["<tool_call>"], VOCABULARY.control["</tool_call>"]
PARAMETERS = {
    "f": {
        "type": "object",
        "$defs": {"n": {"type": "integer"}},
        "properties": {
            "s": {"type": "string"},
            "i": {"$ref": "#/$defs/n"},
            "b": {"type": "boolean"},
            "o": {"type": "object"},
            "m": {"anyOf": [{"type": "number"}, {"type": "null"}]},
        },
    }
}
HERMES_PIECES = [
    *("<tool_call>", "</tool_call>", "\n", "{", "}", '{"name": "f", "arguments": ', '{"x": ', '"a}b"', "1", ", "),
    *('"\\', "\\u65e5", "日", "hello", "STOP", "<think>", "</think>", '{"arguments": {}, "name": "g"}', "<|im_start|>"),
]
XML_PIECES = [
    *("<tool_call>", "</tool_call>", "\n", "<function=f>", "</function>", "<parameter=s>", "<parameter=i>"),
    *("</parameter>", "</para", "<", "12", "true", "日", '"', "hello", "STOP", "<parameter=o>", '{"a": [1]}', "null"),
]


def syntax(form: CallFormat = CallFormat.JSON, parallel: bool = True) -> CallSyntax:
    return CallSyntax(OPEN, CLOSE, form, parallel, PARAMETERS)


def read(
    ids: list[int], cuts: list[int], reason: FinishReason, start: State | None, calls: CallSyntax, **params: Any
) -> dict[str, Any]:
    """The message that deltas cut like this add up to."""
    scored = params.pop("scored", True)
    output = OutputText(VOCABULARY, SamplingParams(**params), start, calls)
    parts: list[TextDelta] = []
    for delta in cut_deltas(ids, cuts, reason, scored):
        parts.append(output.feed(delta))
        if parts[-1].finish_reason is not None:
            break
    told = [c for p in parts for c in p.tool_calls]
    assert all(c.id is None or c.id.startswith("call_") for c in told)
    return {
        "content": "".join(p.content for p in parts),
        "reasoning": "".join(p.reasoning for p in parts),
        "calls": [(c.name, c.arguments) for c in merged(told)],
        "tokens": [t for p in parts for t in p.token_ids],
        "scores": [(s.token_id, s.offset) for p in parts for s in p.scores],
        "end": (parts[-1].finish_reason, parts[-1].stop, output.num_tokens),
    }


def message(text: str, form: CallFormat = CallFormat.JSON, end: bool = True, **params: Any) -> dict[str, Any]:
    ids = tokenizer().encode(text) + [END] * end
    parallel = params.pop("parallel", True)
    reason = FinishReason.STOP if end else FinishReason.LENGTH
    return read(ids, [], reason, params.pop("start", State.CONTENT), syntax(form, parallel), **params)


@given(
    pieces=st.lists(st.sampled_from(HERMES_PIECES), max_size=16) | st.lists(st.sampled_from(XML_PIECES), max_size=16),
    cuts=st.lists(st.integers(0, 60), max_size=12),
    start=st.sampled_from([*State, None]),
    reason=st.sampled_from([FinishReason.STOP, FinishReason.LENGTH]),
    form=st.sampled_from(list(CallFormat)),
    stop=st.sampled_from([(), ("STOP",), ("\n", "hello")]),
    parallel=st.booleans(),
)
@settings(max_examples=400, deadline=None)
def test_any_cutting_gives_the_same_message(
    pieces: list[str],
    cuts: list[int],
    start: State | None,
    reason: FinishReason,
    form: CallFormat,
    stop: tuple[str, ...],
    parallel: bool,
) -> None:
    ids = tokenizer().encode("".join(pieces)) + [END] * (reason is FinishReason.STOP)
    calls = syntax(form, parallel)
    whole = read(ids, [], reason, start, calls, stop=stop)
    assert read(ids, cuts, reason, start, calls, stop=stop) == whole
    single = read(ids, list(range(len(ids))), reason, start, calls, stop=stop)
    assert single == whole
    assert read(ids, cuts, reason, start, calls, stop=stop, scored=False) == whole | {"scores": []}


@given(
    text=st.lists(st.sampled_from(HERMES_PIECES + XML_PIECES), max_size=12).map("".join),
    form=st.sampled_from(CallFormat),
)
@settings(max_examples=200, deadline=None)
def test_nothing_visible_is_lost_without_a_call(text: str, form: CallFormat) -> None:
    """Whatever is not told as a call is content, but for thinking marks and special tokens."""
    read_text = message(text, form, start=None)
    if not read_text["calls"]:
        assert read_text["content"] == text.replace("<|im_start|>", "")


def test_hermes_calls_are_parsed_and_the_newlines_around_them_dropped() -> None:
    one = '<tool_call>\n{"name": "f", "arguments": {"x": 1, "s": "a}\\"]{"}}\n</tool_call>'
    two = '<tool_call>\n{"arguments": {"y": [1, {}]}, "name": "g"}\n</tool_call>'
    for before, content in (("", ""), ("Let me see.\n", "Let me see."), ("a\n\nb\n\n", "a\n\nb")):
        found = message(f"{before}{one}\n{two}")
        assert found["content"] == content
        assert found["calls"] == [("f", '{"x": 1, "s": "a}\\"]{"}'), ("g", '{"y": [1, {}]}')]
        assert found["end"][0] is FinishReason.TOOL_CALLS


def test_arguments_are_streamed_as_they_come() -> None:
    output = OutputText(VOCABULARY, SamplingParams(), State.CONTENT, syntax())
    text = '<tool_call>\n{"name": "f", "arguments": {"x": "hello there", "y": 2}}\n</tool_call>'
    parts = [output.feed(d) for d in cut_deltas([*tokenizer().encode(text), END], list(range(99)), FinishReason.STOP)]
    told = [c for p in parts for c in p.tool_calls]
    assert len(told) > 10
    assert [c.index for c in told] == [0] * len(told)
    assert (told[0].name, [c.name for c in told[1:]]) == ("f", [None] * (len(told) - 1))
    assert "".join(c.arguments for c in told) == '{"x": "hello there", "y": 2}'


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>\nno JSON\n</tool_call>",
        '<tool_call>\n{"name": "f", "arguments": 5}\n</tool_call>',
        '<tool_call>\n{"name": 1, "arguments": {}}\n</tool_call>',
        '<tool_call>\n["f"]\n</tool_call>',
        '<tool_call>\n{"name": "", "arguments": {}}\n</tool_call>',
        "<tool_call>" + "[" * 200 + "</tool_call>",
        '<tool_call>\n{"na',
        "a\n\n<tool_call></tool_call>\n",
        "</tool_call> alone",
    ],
)
def test_what_is_no_call_stays_text(text: str) -> None:
    for end in (True, False):
        found = message(text, end=end)
        assert (found["content"], found["calls"]) == (text, [])
        assert found["end"][0] is (FinishReason.STOP if end else FinishReason.LENGTH)


def test_a_call_that_is_cut_off_gives_what_there_is() -> None:
    found = message('<tool_call>\n{"name": "f", "arguments": {"x": "ab', end=False)
    assert found["calls"] == [("f", '{"x": "ab')]
    assert found["end"][0] is FinishReason.LENGTH
    assert message('<tool_call>\n{"name": "f", "arguments": {}}')["calls"] == [("f", "{}")]
    two = message('<tool_call>\n{"name": "f", "arguments": {}}<tool_call>{"name": "g"}')
    assert two["calls"] == [("f", "{}"), ("g", "{}")]


def test_a_name_beyond_the_head_is_still_found_at_the_end() -> None:
    found = message('<tool_call>{"name": "f", ' + " " * 9000 + '"arguments": {"x": 1}}</tool_call>')
    assert found["calls"] == [("f", '{"x": 1}')]


def test_one_call_only_where_parallel_calls_are_off() -> None:
    call = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    found = message(f"{call}\n{call}", parallel=False)
    assert found["calls"] == [("f", "{}")]
    assert found["end"][:2] == (FinishReason.TOOL_CALLS, CLOSE)
    unclosed = message('<tool_call>\n{"name": "f", "arguments": {}}' + call, parallel=False)
    assert unclosed["calls"] == [("f", "{}")]


def test_a_call_that_the_prompt_leaves_open_goes_on() -> None:
    for form, begun, rest in (
        (CallFormat.JSON, '\n{"name": "f", "arg', 'uments": {"x": 1}}\n</tool_call>\nand more'),
        (CallFormat.JSON, '\n{"name": "f", "arguments": {"x"', ": 1}}</tool_call>\nand more"),
        (CallFormat.XML, "<function=f>\n<parameter=x>", "1</parameter></function></tool_call>\nand more"),
    ):
        prompt = tokenizer().encode(
            f"<|im_start|>user\n<tool_call><|im_end|>\n<|im_start|>assistant\n<tool_call>{begun}"
        )
        calls = syntax(form).after(VOCABULARY, prompt)
        ids = [*tokenizer().encode(rest), END]
        for cuts in ([], list(range(60))):
            found = read(ids, cuts, FinishReason.STOP, State.CONTENT, calls)
            assert [(n, json.loads(a)) for n, a in found["calls"]] == [("f", {"x": 1 if form == "json" else "1"})]
            assert found["content"].strip() == "and more"
    for closed in ("x<tool_call>y</tool_call>", "<tool_call>x<|im_end|><|im_start|>assistant\n", "<tool_call><think>x"):
        assert syntax().after(VOCABULARY, tokenizer().encode(closed)).begun is None
    no_call = syntax().after(VOCABULARY, [OPEN, *tokenizer().encode("no")])
    assert (
        read([*tokenizer().encode(" call"), END], [], FinishReason.STOP, None, no_call)["content"]
        == "<tool_call>no call"
    )


def test_marks_in_reasoning_are_reasoning() -> None:
    text = '<tool_call>{"name": "f"}</tool_call>\n</think>\n\nanswer'
    found = message(text, start=State.REASONING)
    assert (found["reasoning"], found["content"], found["calls"]) == (text.partition("\n")[0], "answer", [])


def test_a_call_after_thinking() -> None:
    call = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    found = message(f"<think>\nhm\n</think>\n\n{call}", start=State.UNDECIDED)
    assert (found["reasoning"], found["content"], found["calls"]) == ("hm", "", [("f", "{}")])


def test_stop_strings_act_on_content_only() -> None:
    call = '<tool_call>\n{"name": "f", "arguments": {"x": "STOP"}}\n</tool_call>'
    found = message(f"a ST{call}", stop=("STOP",))
    assert (found["content"], found["calls"]) == ("a ST", [("f", '{"x": "STOP"}')])
    assert message("one\nSTOP two", stop=("STOP",))["content"] == "one\n"


def xml(*parameters: tuple[str, str]) -> str:
    body = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in parameters)
    return f"<tool_call>\n<function=f>\n{body}</function>\n</tool_call>"


def test_coder_values_follow_the_schema() -> None:
    text = xml(("s", "12"), ("i", "12"), ("b", "True"), ("o", '{"a": [1]}'), ("m", "null"), ("other", "x < y\n\n"))
    found = message(text, CallFormat.XML)
    assert found["content"] == ""
    assert [json.loads(a) for _, a in found["calls"]] == [
        {"s": "12", "i": 12, "b": True, "o": {"a": [1]}, "m": None, "other": "x < y\n\n"}
    ]


def test_coder_text_that_does_not_convert_stays_a_string() -> None:
    found = message(xml(("i", "many"), ("b", "yes"), ("o", "{"), ("m", "NaN"), ("s", "null")), CallFormat.XML)
    assert json.loads(found["calls"][0][1]) == {"i": "many", "b": "yes", "o": "{", "m": "NaN", "s": "null"}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("<function=f>\n</function>", {}),
        ("<function=f><parameter=s>a</parameter></function>", {"s": "a"}),
        ("<function=f>\n<parameter=s>\na\n<parameter=i>\n3\n</function>", {"s": "a", "i": 3}),
        ("<function=f>\n<parameter=s>\n\n\na\n\n</parameter>\n</function>", {"s": "\n\na\n"}),
        ("<function=f>\n<parameter=s>\n</parameter>\n</function>", {"s": ""}),
        ("<function=f>\n<parameter=s>\n\n</parameter>\n</function>", {"s": ""}),
        ("<function=f>\n<parameter=s>a</parameter><parameter=s>b</parameter></function>", {"s": "a"}),
        ("<function=f>\n<parameter=s>\nopen", {"s": "open"}),
        ("<function=f>\n<parameter=s>\n</para\n</parameter>", {"s": "</para"}),
        ("<function=f>", {}),
    ],
)
def test_coder_forms(body: str, expected: dict[str, Any]) -> None:
    found = message(f"<tool_call>\n{body}\n</tool_call>", CallFormat.XML)
    assert [(n, json.loads(a)) for n, a in found["calls"]] == [("f", expected)]


def test_coder_strings_are_streamed() -> None:
    parser = CoderCall(PARAMETERS)
    first = parser.feed('<function=f>\n<parameter=s>\nab"c')
    assert first is not None
    assert (first.name, first.arguments) == ("f", '{"s": "ab\\"c')
    more = parser.feed("日")
    assert more is not None
    assert more.arguments == "日"


def test_types_and_conversion() -> None:
    assert types_of(PARAMETERS["f"], "i") == {"integer"}
    assert types_of({"properties": {"x": {"enum": ["a", 1, None]}}}, "x") == {"string", "integer", "number", "null"}
    assert types_of({"properties": {"x": {"$ref": "#/properties/x"}}}, "x") == {"string"}
    assert types_of({}, "x") == {"string"}
    assert converted("5.0", frozenset({"integer"})) == 5.0
    assert converted("5.5", frozenset({"integer"})) == "5.5"
    assert converted("1e999", frozenset({"number"})) == "1e999"
    assert converted("9" * 5000, frozenset({"integer"})) == "9" * 5000


@pytest.mark.parametrize("variant", ["hybrid", "thinking", "instruct", "coder", "base"])
def test_format_is_read_off_the_template(variant: str) -> None:
    expected = {"coder": CallFormat.XML, "base": None}.get(variant, CallFormat.JSON)
    assert detect_format(tokenizer(variant)) is expected
    assert ChatFormat(tokenizer(variant)).call_format is expected


def test_no_tools_no_calls() -> None:
    assert call_syntax(VOCABULARY, CallFormat.JSON, Tools()) is None
    text = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    output = OutputText(VOCABULARY, SamplingParams(), State.CONTENT, None)
    assert output.feed(cut_deltas([*tokenizer().encode(text), END], [], FinishReason.STOP)[0]).content == text


HOSTILE = {
    "quotes": '{"name": "f", "arguments": {"a":' + '["",' * 250_000,
    "braces": '{"name": "f", "arguments": ' + "{" * 1_000_000,
    "lists": '{"name": "f", "arguments": {"a":[' + "[],[]," * 166_000,
    "backslashes": '{"name": "f", "arguments": {"a":"' + "\\" * 1_000_000,
    "blank": " " * 1_000_000,
    "names": '{"name": "' * 100_000,
    "numbers": '{"x": ' + "1" * 1_000_000,
    "open tags": "<function=f>" + "<parameter=" * 90_000,
    "no tag": "<function=" + "a" * 1_000_000,
    "parameters": "<function=f>" + "<parameter=s></parameter>" * 40_000,
    "keys": "<function=f>" + "".join(f"<parameter={i}></parameter>" for i in range(36_000)),
    "angles": "<function=f><parameter=s>" + "<" * 1_000_000,
    "half ends": "<function=f><parameter=o>" + "\n</parameter" * 80_000,
    "newlines": "<function=f><parameter=s>" + "\n" * 1_000_000,
}


@pytest.mark.parametrize("step", [16, 1_000_000])
@pytest.mark.parametrize("name", HOSTILE)
def test_what_a_megabyte_of_hostile_output_costs_grows_with_its_length_alone(name: str, step: int) -> None:
    """Eight times as long, eight times as much, not 64 times; with room for whatever else computes on this machine."""
    text = HOSTILE[name]
    for make in (HermesCall, lambda: CoderCall(PARAMETERS)):
        whole = part = float("inf")
        for _ in range(5):
            whole = min(whole, _seconds(make(), text, step))
            part = min(part, _seconds(make(), text[: len(text) // 8], step))
            if whole < 20 * part + 0.01:
                break
        assert whole < 20 * part + 0.01, (whole, part)


def _seconds(parser: CallParser, text: str, step: int) -> float:
    begin = time.process_time()
    for i in range(0, len(text), step):
        parser.feed(text[i : i + step])
    parser.close()
    return time.process_time() - begin
