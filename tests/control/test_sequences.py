"""Parameters out of their range are refused wherever they come from, not understood as something else."""

from __future__ import annotations

import math

import pytest

from tpqwen.api import fields
from tpqwen.errors import RequestError
from tpqwen.request import SamplingParams
from tpqwen.text.sequences import RANGES, Limits, expand

LIMITS = Limits(100, 1000, (7,))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1.0),
        ("temperature", 2.5),
        ("temperature", math.nan),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", -2),
        ("min_p", 1.1),
        ("presence_penalty", -3.0),
        ("frequency_penalty", math.inf),
        ("repetition_penalty", 0.0),
        ("n", 0),
        ("n", 17),
        ("min_tokens", -1),
        ("max_tokens", -1),
        ("logprobs", 21),
        ("prompt_logprobs", -1),
    ],
)
def test_a_parameter_out_of_its_range_is_refused_by_name(name, value):
    with pytest.raises(RequestError, match=rf"^{name} is .*; it must be") as refused:
        expand("a", [1, 2], SamplingParams(**{name: value}), LIMITS)
    assert (refused.value.param, refused.value.code) == (name, "out_of_range")


def test_the_ends_of_the_ranges_are_in():
    for name, (low, high, is_open) in RANGES.items():
        for value in () if is_open or math.isinf(high) else (low, high):
            expand("a", [1, 2], SamplingParams(**{name: value}), LIMITS)


def test_the_ranges_are_those_of_http():
    table = {field.maps_to or field.name: field.shape for field in fields._SAMPLING}
    for name, (low, high, is_open) in RANGES.items():
        shape = table.get(name)
        if shape is not None:
            theirs = (shape.low, math.inf if shape.high is None else shape.high, getattr(shape, "open_low", False))
            assert theirs == (low, high, is_open), name
