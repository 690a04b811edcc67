"""The tables of parameters: strictness, schema, and that every documented field exists."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpqwen.api.body import parse
from tpqwen.api.fields import CHAT, COMPLETIONS, UNSUPPORTED, Field, sampling_values, schema, validate
from tpqwen.errors import RequestError
from tpqwen.request import SamplingParams

TABLES = {"chat": CHAT, "completions": COMPLETIONS}
SCHEMAS = {name: jsonschema.Draft202012Validator(schema(table)) for name, table in TABLES.items()}
REQUIRED: dict[str, dict[str, Any]] = {
    "chat": {"messages": [{"role": "user", "content": "x"}]},
    "completions": {"prompt": "x"},
}
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def accepted(name: str, body: dict[str, Any]) -> bool:
    try:
        validate(TABLES[name], body)
    except RequestError as error:
        return refused(error)
    return True


def refused(error: RequestError) -> bool:
    assert (error.status, error.code is not None) == (400, True)
    return False


@pytest.mark.parametrize("name", TABLES)
def test_table_is_sound(name: str) -> None:
    names = [f.name for f in TABLES[name]]
    assert len(set(names)) == len(names)
    assert not {f.maps_to for f in TABLES[name]} - {"", *SamplingParams.__struct_fields__}
    jsonschema.Draft202012Validator.check_schema(schema(TABLES[name]))


@pytest.mark.parametrize("name", TABLES)
def test_null_is_absent_except_where_required(name: str) -> None:
    for field in TABLES[name]:
        assert accepted(name, {**REQUIRED[name], field.name: None}) is not field.required
    for unsupported in UNSUPPORTED:
        assert accepted(name, {**REQUIRED[name], unsupported: None})


@given(name=st.sampled_from(list(TABLES)), value=json_values, data=st.data())
@settings(max_examples=200, deadline=None)
def test_any_value_is_accepted_or_refused_by_name(name: str, value: Any, data: st.DataObject) -> None:
    field: Field = data.draw(st.sampled_from(TABLES[name]))
    accepted(name, {**REQUIRED[name], field.name: value})


@given(name=st.sampled_from(list(TABLES)), value=json_values, data=st.data())
@settings(max_examples=150, deadline=None)
def test_what_is_accepted_fits_the_schema(name: str, value: Any, data: st.DataObject) -> None:
    field: Field = data.draw(st.sampled_from(TABLES[name]))
    body = {**REQUIRED[name], field.name: value}
    if field.name not in ("messages",) and accepted(name, body):
        SCHEMAS[name].validate(body)


@given(data=st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
@settings(max_examples=150, deadline=None)
def test_any_bytes_are_an_object_or_a_refusal(data: bytes) -> None:
    try:
        value: object = parse(data)
    except RequestError as error:
        value = {"refused": refused(error)}
    assert isinstance(value, dict)


@given(value=st.dictionaries(st.text(max_size=5), json_values, max_size=4))
@settings(max_examples=80, deadline=None)
def test_valid_json_is_read_as_it_is(value: dict[str, Any]) -> None:
    for ascii_only in (True, False):
        assert parse(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


def test_values_go_where_the_table_says() -> None:
    values = validate(CHAT, {**REQUIRED["chat"], "temperature": 1, "seed": 5, "stop": "x", "logit_bias": {"7": 1}})
    assert sampling_values(CHAT, values) == {"temperature": 1.0, "seed": 5, "logit_bias": {7: 1.0}}
    assert values["stop"] == ["x"]


def test_deep_nesting_is_measured() -> None:
    def nested(levels: int) -> bytes:
        return b'{"a": ' * (levels - 1) + b"{}" + b"}" * (levels - 1)

    assert parse(nested(64))
    with pytest.raises(RequestError, match="nested"):
        parse(nested(65))
    assert parse(json.dumps({"a": [{"b": 1}] * 100}).encode())
