"""Schemas to masks: whatever the masks allow is valid under the schema; what can't be enforced is refused by path."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from functools import cache
from pathlib import Path
from random import Random
from tempfile import mkdtemp
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.control.test_tool_calls import CLOSE, OPEN, read
from tests.text_fixture import tokenizer, write_tokenizer
from tpqwen import structure as s
from tpqwen.errors import RequestError
from tpqwen.grammar import GrammarError, Vocabulary
from tpqwen.request import FinishReason
from tpqwen.text.patterns import checked_regex
from tpqwen.text.schema import checked_schema
from tpqwen.text.structures import call_structure
from tpqwen.text.thinking import State
from tpqwen.text.tools import CallFormat, CallSyntax, Choice, Tools

END = tokenizer().vocabulary.control["<|im_end|>"]
SIZE = 448


@cache
def vocabulary() -> Vocabulary:
    return Vocabulary(write_tokenizer(Path(mkdtemp(prefix="tpqwen-vocabulary-"))), SIZE)


def walk(structure: s.Structure, seed: int, eager: float = 0.3, longest: int = 400) -> str | None:
    """A text that the masks allow, drawn at random; None when it got too long. Ends and closing tokens are favoured."""
    random = Random(seed)
    matcher = vocabulary().matcher(vocabulary().compile(structure), (END,))
    ids: list[int] = []
    closing = set(tokenizer().encode('"}],'))
    chain: list[int] = []
    for _ in range(longest):
        masks = np.zeros((1, vocabulary().num_words), np.int32)
        matcher.fill(masks, 0)
        allowed = np.flatnonzero(np.unpackbits(masks.view(np.uint8), bitorder="little")).tolist()
        assert allowed, tokenizer().decode(ids)
        if END in allowed and (random.random() < eager or allowed == [END]):
            assert matcher.take(END)
            return tokenizer().decode(ids)
        if not chain and random.random() < 0.2:  # what ends a parameter or a call takes several tokens in a row
            chain = tokenizer().encode_plain(random.choice(["\n</parameter>\n", "</function>\n", "}\n"]))
        favoured = [i for i in allowed if i in closing]
        if chain and chain[0] in allowed:
            favoured = [chain.pop(0)]
        else:
            chain = []
        few = favoured if favoured and (chain or random.random() < 0.5) else [i for i in allowed if i != END]
        ids.append(random.choice(few))
        assert matcher.take(ids[-1])
    return None


NODE = {"type": "object", "properties": {"v": {"type": "integer"}, "next": {"$ref": "#/$defs/n"}}, "required": ["v"]}
SCHEMAS: list[Any] = [
    {"type": "object"},
    {"type": "array", "items": {"type": ["integer", "null"]}, "minItems": 1, "maxItems": 4},
    {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "number"}}, "required": ["a"]},
    {"type": "object", "properties": {"a": {"type": "string"}}, "additionalProperties": {"type": "integer"}},
    {"type": "object", "additionalProperties": {"type": "boolean"}, "minProperties": 1, "maxProperties": 2},
    {"type": "object", "properties": {"a": True, "b": {"type": "null"}}, "minProperties": 1, "required": ["b"]},
    {"type": "object", "patternProperties": {"^x[a-z]{1,3}$": {"type": "integer"}}},
    {"type": "object", "propertyNames": {"type": "string", "pattern": "^x[a-z]+$"}},
    {"type": "string", "minLength": 2, "maxLength": 5},
    {"type": "string", "minLength": 3},
    {"type": "string", "pattern": "^[a-z]+-\\d{2,4}$"},
    {"type": "string", "pattern": "[^a]+"},
    {"type": "string", "pattern": "^(?:yes|no)\\s*[\\\\]?$"},
    {"type": "string", "pattern": "^[ -~]{1,5}$"},
    {"type": "string", "pattern": "^[^\\n]{1,2}\\u0041[\\\\/]$"},
    {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "minProperties": 2},
    {"type": "integer", "minimum": -5, "exclusiveMaximum": 1000},
    {"type": "integer", "multipleOf": 7},
    {"type": "number", "minimum": -0.5, "maximum": 12.25},
    {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}], "items": False, "minItems": 2},
    {"enum": ['a"b\\', 1.5, None, {"x": [1]}, "日本", True]},
    {"const": {"x": "a\nb"}},
    {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"enum": [1, 2]}}]},
    {"oneOf": [{"type": "integer"}, {"type": "string"}]},
    {
        "oneOf": [
            {"type": "object", "properties": {"t": {"const": k}, k: {"type": "integer"}}, "required": ["t", k]}
            for k in ("x", "y")
        ]
    },
    {"allOf": [{"type": "integer"}]},
    {
        "type": "object",
        "properties": {
            n: {"type": "string", "maxLength": 3} for n in ("minLength", "format", "enum", "default", "items")
        },
        "required": ["minLength", "format", "enum", "default", "items"],
    },
    {"type": "object", "properties": {"x": {"default": "y", "type": "string", "enum": ["y", "z"]}}, "required": ["x"]},
    {"$defs": {"n": NODE}, "$ref": "#/$defs/n"},
    {"title": "T", "description": "D", "type": "boolean", "default": True},
    *({"type": "string", "format": f} for f in ("date", "time", "date-time", "ipv4", "uuid", "email", "uri")),
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda x: json.dumps(x)[:60])
def test_whatever_the_masks_allow_is_valid(schema: Any) -> None:
    structure = s.Schema(checked_schema(schema, "schema"))
    # Of a date only the form is enforced: the masks allow the 30th of February.
    checker = jsonschema.FormatChecker(("ipv4", "uuid", "email"))
    validator = jsonschema.Draft202012Validator(schema, format_checker=checker)
    texts = [t for seed in range(12) if (t := walk(structure, seed)) is not None]
    assert len(texts) >= 4
    for text in texts:
        assert "\n" not in text
        validator.validate(json.loads(text))


REFUSED: list[tuple[Any, str]] = [
    ({"not": {"type": "string"}}, "not"),
    ({"type": "array", "items": {"type": "integer"}, "uniqueItems": True}, "uniqueItems"),
    ({"type": "object", "properties": {"a": {"type": "array", "contains": {}}}}, "properties.a.contains"),
    ({"type": "object", "if": {}, "then": {}}, "if"),
    ({"type": "object", "required": ["z"]}, "required"),
    ({"type": "string", "format": "madeup"}, "format"),
    ({"type": "string", "maxLength": 500}, "maxLength"),
    ({"type": "string", "pattern": "a", "maxLength": 5}, "maxLength"),
    ({"type": "string", "pattern": 'a"b'}, "pattern"),
    ({"type": "string", "pattern": "a(?=b)"}, "pattern"),
    ({"type": "string", "pattern": "a^b"}, "pattern"),
    *(
        ({"type": "string", "pattern": p}, "pattern")
        for p in ("\\bx", "\\n", "\\x41", "\\\\", "[\\t]", "\\u0009", "\t", "\\1")
    ),
    ({"type": "object", "minProperties": 2}, "minProperties"),
    ({"type": "string", "format": "json-pointer"}, "format"),
    ({"type": "number", "multipleOf": 0.5}, "multipleOf"),
    ({"minimum": 5}, "minimum"),
    ({"type": "object", "minimum": 5}, "minimum"),
    ({"type": "madeup"}, "type"),
    ({"$ref": "http://x/y"}, "$ref"),
    ({"$ref": "#/$defs/none"}, "$ref"),
    ({"$ref": "#", "minimum": 1}, "minimum"),
    ({"allOf": [{"type": "integer"}, {"type": "number"}]}, "allOf"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
    ({"anyOf": []}, "anyOf"),
    ({"type": "string", "enum": ["a", 1]}, "enum"),
    ({"type": "object", "patternProperties": [1]}, "patternProperties"),
    ({"$defs": 5, "$ref": "#/$defs"}, "$defs"),
    ({"anyOf": [{"type": "object", "properties": {"b": {"foo": 1}}}]}, "anyOf[0].properties.b.foo"),
    ({"type": "array", "items": [{"type": "integer"}]}, "items"),
    ({"type": "array", "minItems": -1}, "minItems"),
    ({"type": "object", "properties": 5}, "properties"),
    (False, ""),
    ({"type": "string", "title": "x" * 70_000}, ""),
]


@pytest.mark.parametrize(("schema", "path"), REFUSED, ids=lambda x: json.dumps(x)[:50])
def test_what_cannot_be_enforced_is_refused_by_path(schema: Any, path: str) -> None:
    with pytest.raises(RequestError) as caught:
        checked_schema(schema, "schema")
    assert caught.value.param == (f"schema.{path}" if path else "schema")
    assert (caught.value.status, caught.value.code) == (400, "unsupported_schema")


def test_depth_is_limited() -> None:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(31):
        schema = {"type": "array", "items": schema}
    assert checked_schema(schema, "schema")
    with pytest.raises(RequestError, match="nested"):
        checked_schema({"type": "array", "items": schema}, "schema")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
WORDS = ["type", "properties", "items", "anyOf", "oneOf", "required", "enum", "const", "$ref", "pattern", "minLength"]


@given(
    schema=st.recursive(
        json_values | st.sampled_from(["object", "string", "#", "^a$"]),
        lambda inner: st.dictionaries(st.sampled_from(WORDS), inner, max_size=4) | st.lists(inner, max_size=3),
        max_leaves=10,
    )
)
@settings(max_examples=300, deadline=None)
def test_any_json_is_compiled_or_refused(schema: Any) -> None:
    with suppress(RequestError, GrammarError):
        assert vocabulary().compile(s.Schema(checked_schema(schema, "schema")))


@given(text=st.text(max_size=20))
@settings(max_examples=60, deadline=None)
def test_a_literal_allows_exactly_itself(text: str) -> None:
    plain = tokenizer().decode(tokenizer().encode_plain(text))
    if "\x00" not in plain:
        assert walk(s.Literal(plain), 0) == plain


def test_regex_choice_grammar_and_exclusion() -> None:
    assert {walk(s.Choice((s.Literal("red"), s.Literal('gr"n'))), seed) for seed in range(20)} == {"red", 'gr"n'}
    assert all(
        (walk(s.Regex("[ab]{2}c?"), seed) or "") in ("aa", "ab", "ba", "bb", "aac", "abc", "bac", "bbc")
        for seed in range(9)
    )
    grammar = 'root ::= item ("," item)*\nitem ::= [0-9] | "x"'
    for seed in range(6):
        assert all(p in set("0123456789x") for p in (walk(s.Ebnf(grammar), seed) or "x").split(","))
    for seed in range(12):
        assert "</a>" not in (walk(s.Without(("</a>", "END")), seed) or "")


@pytest.mark.parametrize(
    "pattern",
    [r"\u0041.{2}", r"[^a]\n\t", r"a\\b", '"x"', r"(?:a|b){2,}c*?", r"^ab$|c", r"[\]\[\\^-]", r"\.\*/", r"\d\D\w\W"],
)
def test_regular_expressions_are_followed_to_the_letter(pattern: str) -> None:
    texts = [walk(s.Regex(checked_regex(pattern, "regex")), seed, longest=60) for seed in range(15)]
    assert [t for t in texts if t is not None and not re.fullmatch(pattern, t, re.ASCII)] == []
    assert any(t is not None for t in texts)


@pytest.mark.parametrize(
    "pattern", ["a(?=b)", "(?P<n>a)", "a^b", "a$b", r"\bx", r"\x41b", r"(a)\1", r"\p{L}", "a*+", r"\cA"]
)
def test_regular_expressions_that_would_be_misread_are_refused(pattern: str) -> None:
    with pytest.raises(RequestError) as caught:
        checked_regex(pattern, "regex")
    assert caught.value.param == "regex"


def test_control_tokens_never_match_as_text() -> None:
    masks = np.zeros((1, vocabulary().num_words), np.int32)
    vocabulary().matcher(vocabulary().compile(s.Regex("[\\s\\S]*")), (END,)).fill(masks, 0)
    allowed = set(np.flatnonzero(np.unpackbits(masks.view(np.uint8), bitorder="little")).tolist())
    control = tokenizer().vocabulary.control
    assert allowed & set(control.values()) == {END}
    assert max(allowed) < tokenizer().vocabulary.size


@pytest.mark.parametrize(
    "structure",
    [
        s.Regex("("),
        s.Regex("a(?P<n>b"),
        s.Ebnf("root ::= nothing"),
        s.Ebnf("no rule"),
        s.Ebnf(""),
        s.Ebnf('a ::= "b"'),
        s.Schema("{"),
        s.Schema('{"type": 5}'),
        s.Schema('{"type": "integer", "minimum": 5, "maximum": 3}'),
        s.Ebnf("root ::= root"),
        s.Choice((s.Regex("["), s.Literal("a"))),
    ],
    ids=str,
)
def test_what_does_not_compile_says_so(structure: s.Structure) -> None:
    with pytest.raises(GrammarError) as caught:
        vocabulary().compile(structure)
    assert "/" not in str(caught.value).split()[0]


FUNCTION = {
    "name": "f",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {
            "s": {"type": "string"},
            "k": {"enum": ["a", "b c"]},
            "i": {"$ref": "#/$defs/i"},
            "o": {"type": "object", "properties": {"x": {"type": "boolean"}}, "required": ["x"]},
        },
        "required": ["s", "i"],
        "$defs": {"i": {"type": "integer", "minimum": 0, "maximum": 99}},
    },
}
OTHER = {"name": "g"}


@pytest.mark.parametrize("form", CallFormat)
@pytest.mark.parametrize("choice", [Choice.AUTO, Choice.REQUIRED, Choice.NAMED])
def test_calls_that_the_masks_allow_are_parsed_and_valid(form: CallFormat, choice: Choice) -> None:
    tools = Tools([{"type": "function", "function": f} for f in (FUNCTION, OTHER)], choice, "f" * (choice == "named"))
    structure = call_structure(tools, form)
    assert structure is not None
    syntax = CallSyntax(OPEN, CLOSE, form, True, tools.parameters)
    seen = set()
    for seed in range(25):
        text = walk(structure, seed)
        if text is None:
            continue
        ids = [OPEN, *tokenizer().encode_plain(text), CLOSE, END]
        ((name, arguments),) = read(ids, [], FinishReason.STOP, State.CONTENT, syntax)["calls"]
        seen.add(name)
        if name == "f":
            jsonschema.validate(json.loads(arguments), FUNCTION["parameters"])
        else:
            assert isinstance(json.loads(arguments), dict)
    assert seen == ({"f"} if choice is Choice.NAMED else {"f", "g"})


def bodies(form: CallFormat, choice: Choice, **fields: Any) -> s.Structure | None:
    tools = Tools([{"type": "function", "function": {"name": "f", **fields}}], choice)
    return call_structure(tools, form)


@pytest.mark.parametrize("form", CallFormat)
def test_what_a_strict_function_cannot_keep_is_refused_and_of_another_left_free(form: CallFormat) -> None:
    free = bodies(form, Choice.REQUIRED)
    for schema in (
        {"type": "object", "properties": {"a": {"type": "string", "maxLength": 500}}},
        {"type": "object", "properties": {"a": {"type": "object", "not": {}}}},
        {"type": "object", "properties": {"a": {"$ref": "http://x"}}},
        {"anyOf": [{"not": {}}]},
    ):
        assert bodies(form, Choice.REQUIRED, parameters=schema) == free
        with pytest.raises(RequestError) as caught:
            bodies(form, Choice.AUTO, parameters=schema, strict=True)
        assert str(caught.value.param).startswith("tools[0].function.parameters")


def test_xml_values_cannot_hold_what_would_end_them() -> None:
    for schema in (
        {"type": "object", "properties": {"a": {"enum": ["x</parameter>"]}}},
        {"type": "object", "properties": {"a>b": {"type": "string"}}},
        {"type": "object", "properties": {"a": {"type": "string", "pattern": "^a$"}}},
        {"type": "object", "properties": {"a": {"type": "string"}}, "minProperties": 1},
    ):
        with pytest.raises(RequestError):
            bodies(CallFormat.XML, Choice.AUTO, parameters=schema, strict=True)
    circle = {"type": "object", "properties": {"a": {"$ref": "#/properties/a"}}}
    assert bodies(CallFormat.XML, Choice.AUTO, parameters=circle, strict=True)


def test_auto_without_strict_functions_binds_nothing() -> None:
    assert call_structure(Tools([{"type": "function", "function": OTHER}], Choice.AUTO), CallFormat.JSON) is None
