"""NaN in one row of a step: its own request ends with an error, its neighbours get the tokens they would have got."""

from __future__ import annotations

import pytest

from tpqwen.request import FinishReason

pytestmark = pytest.mark.ray


@pytest.mark.parametrize("when", [("decode", 9), ("prefill", 2)], ids=str)
def test_a_nan_row_ends_its_own_request_and_its_pages_are_not_used_again(served, when):
    expected = served.expected()
    before = len(served.hooks.recoveries)
    served.faults.plan(("rank 1", *when, "nan"))
    found = served.streams(served.requests())
    assert not served.faults.pending
    served.faults.plan()
    ended = [i for i, seen in enumerate(found) if seen.error is not None]
    assert len(ended) == 1
    spoiled = found[ended[0]]
    assert (spoiled.finish_reason, spoiled.error_code) == (FinishReason.ERROR, "numerical_error")
    assert spoiled.tokens == expected[ended[0]].tokens[: len(spoiled.tokens)]
    for i, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        if i not in ended:
            mine.assert_equals(theirs)
    served.run(served.until_idle())
    for mine, theirs in zip(served.streams(served.requests()), expected, strict=True):
        mine.assert_equals(theirs)  # the same prompts again, which would find the pages
    assert len(served.hooks.recoveries) == before
