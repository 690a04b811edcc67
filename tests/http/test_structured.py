"""Forms of the output over HTTP: what reaches compiler and engine, and what is refused."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.http.driver import CHAT, COMPLETIONS, HELLO, post
from tests.http.fake_engine import Server, ids, make_server
from tests.http.test_tools import TIME, WEATHER, function
from tpqwen.errors import RequestError
from tpqwen.request import Guide
from tpqwen.structure import Choice, Ebnf, Literal, Regex, Schema, Sequence, Structure

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
NAMED = {"type": "function", "function": {"name": "time"}}


@dataclass
class FakeCompiler:
    """Implements structure.Compiler: remembers what it was asked, refuses the regex "bad"."""

    asked: list[tuple[Structure, str]] = field(default_factory=list)

    async def compile(self, structure: Structure, param: str) -> bytes:
        if structure == Regex("bad"):
            raise RequestError(f"{param}: does not compile", param=param, code="invalid_value")
        self.asked.append((structure, param))
        return f"grammar {len(self.asked)}".encode()


def served(variant: str = "hybrid") -> tuple[Server, FakeCompiler]:
    compiler = FakeCompiler()
    return make_server(variant=variant, compiler=compiler), compiler


def guide_of(variant: str = "hybrid", path: str = CHAT, **body: Any) -> tuple[Guide, list[tuple[Structure, str]]]:
    server, compiler = served(variant)
    given = {"messages": HELLO} if path == CHAT else {"prompt": "x"}
    answer = post(server.app, path, **given, **body)
    assert answer.status_code == 200, answer.text
    guide = server.engine.requests[0].guide
    assert guide is not None
    return guide, compiler.asked


def json_schema(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}


@pytest.mark.parametrize(
    ("body", "structure", "param"),
    [
        (
            {"response_format": json_schema(SCHEMA)},
            Schema(json.dumps(SCHEMA)),
            "response_format.json_schema.schema",
        ),
        ({"response_format": {"type": "json_object"}}, Schema('{"type": "object"}'), "response_format"),
        ({"structured_outputs": {"json": SCHEMA}}, Schema(json.dumps(SCHEMA)), "structured_outputs.json"),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, Schema(json.dumps(SCHEMA)), "structured_outputs.json"),
        ({"structured_outputs": {"regex": "a+"}}, Regex("a+"), "structured_outputs.regex"),
        (
            {"structured_outputs": {"choice": ["yes", "no"]}},
            Choice((Literal("yes"), Literal("no"))),
            "structured_outputs.choice",
        ),
        ({"structured_outputs": {"grammar": 'root ::= "a"'}}, Ebnf('root ::= "a"'), "structured_outputs.grammar"),
    ],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_each_form_is_compiled_and_reaches_the_engine(
    path: str, body: dict[str, Any], structure: Structure, param: str
) -> None:
    guide, asked = guide_of(path=path, **body)
    assert asked == [(structure, param)]
    assert (guide.answer, guide.call, guide.calls) == (b"grammar 1", b"", -1)


def test_the_guide_knows_marks_ends_and_where_the_prompt_stops() -> None:
    control = make_server().chat.vocabulary.control
    end = control["<|im_end|>"]
    body = {"response_format": {"type": "json_object"}, "min_tokens": 3, "stop_token_ids": [9]}
    for variant, more, inside, may_think in (
        ("hybrid", {}, False, True),
        ("hybrid", {"chat_template_kwargs": {"enable_thinking": False}}, False, False),
        ("thinking", {}, True, False),
        ("instruct", {}, False, False),
    ):
        guide, _ = guide_of(variant, **body, **more)
        assert (guide.inside, guide.may_think) == (inside, may_think)
        assert (guide.think_open, guide.think_close) == (control["<think>"], control["</think>"])
        assert (guide.end_ids, guide.forbidden_ids, guide.min_tokens) == ((end,), (end, 9), 3)
        assert guide.newline_id == ids("\n")[0]
    plain, _ = guide_of(path=COMPLETIONS, **body)
    assert (plain.inside, plain.may_think) == (False, False)


def test_every_choice_is_guided_and_other_requests_are_not() -> None:
    server, compiler = served()
    post(server.app, CHAT, messages=HELLO, n=3, response_format={"type": "json_object"})
    post(server.app, CHAT, messages=HELLO, response_format={"type": "text"})
    post(server.app, CHAT, messages=HELLO, tools=[TIME])
    assert [r.guide is not None for r in server.engine.requests] == [True] * 3 + [False] * 2
    assert len(compiler.asked) == 1


def test_demanded_calls_have_declared_names_and_arguments() -> None:
    guide, asked = guide_of("instruct", tools=[WEATHER, TIME], tool_choice="required")
    parameters = json.dumps(WEATHER["function"]["parameters"])
    expected = Choice(
        (
            Sequence((Literal('\n{"name": "weather", "arguments": '), Schema(parameters), Literal("}\n"))),
            Sequence((Literal('\n{"name": "time", "arguments": '), Schema('{"type": "object"}'), Literal("}\n"))),
        )
    )
    assert asked == [(expected, "tools")]
    assert (guide.answer, guide.call, guide.calls, guide.parallel) == (b"", b"grammar 1", 1, True)
    guide, asked = guide_of("instruct", tools=[WEATHER, TIME], tool_choice=NAMED)
    assert asked == [(Choice(expected.parts[1:]), "tools")]
    assert (guide.calls, guide.parallel) == (1, False)


def test_strict_functions_bind_calls_under_auto() -> None:
    strict = function(name="s", strict=True, parameters=SCHEMA)
    guide, asked = guide_of("instruct", tools=[strict, WEATHER])
    assert guide.calls == 0
    structure = asked[0][0]
    assert isinstance(structure, Choice)
    bodies = [part.parts[1] for part in structure.parts if isinstance(part, Sequence)]
    assert bodies == [Schema(json.dumps(SCHEMA)), Schema('{"type": "object"}')]
    guide, asked = guide_of("instruct", tools=[TIME], response_format={"type": "json_object"})
    assert (guide.answer, guide.call, guide.calls, len(asked)) == (b"grammar 1", b"", 0, 1)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "text", "json_schema": {"name": "x", "schema": {}}}},
            "response_format.json_schema",
        ),
        ({"response_format": json_schema({"not": {}})}, "response_format.json_schema.schema.not"),
        ({"response_format": json_schema([])}, "response_format.json_schema.schema"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"regex": "bad"}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "a" * 70_000}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs"),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos"),
        ({"response_format": {"type": "json_object"}, "tools": [TIME], "tool_choice": "required"}, "tool_choice"),
        (
            {"tools": [function(name="f", strict=True, parameters={"type": "object", "not": {}})]},
            "tools[0].function.parameters.not",
        ),
        (
            {"tools": [TIME, function(name="f", strict=True, parameters={"properties": {"a": {"foo": 1}}})]},
            "tools[1].function.parameters.properties.a.foo",
        ),
    ],
)
def test_refusals_name_the_field(body: dict[str, Any], param: str) -> None:
    server, _ = served()
    answer = post(server.app, CHAT, messages=HELLO, **body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    assert not server.engine.requests


def test_without_a_compiler_a_form_is_refused() -> None:
    for body in ({"response_format": {"type": "json_object"}}, {"tools": [TIME], "tool_choice": "required"}):
        answer = post(make_server().app, CHAT, messages=HELLO, **body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unsupported_parameter")
