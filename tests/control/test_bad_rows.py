"""NaN in a row: its sequence ends, and what others read of its blocks is computed again."""

from __future__ import annotations

import pytest

from tests.control.test_scheduler import Pair, request
from tests.fakes import expected_tokens, tiny_capacity
from tpqwen.request import FinishReason

PROMPT = list(range(100, 112))


@pytest.mark.parametrize("both", [False, True])
def test_who_shares_blocks_with_a_bad_row_is_computed_again_without_them(both: bool) -> None:
    """The second one has read the first one's blocks before anybody could know; both sample in the same step."""
    bad = {"first"} | ({"second"} if both else set())
    names = {1: "first", 2: "second", 3: "other"}

    def is_bad(history: object, params: object) -> bool:
        name = names[params.choice]  # type: ignore[attr-defined]
        spoiled = name in bad
        bad.discard(name)
        return spoiled

    pair = Pair(tiny_capacity(num_blocks=60, max_batched_tokens=8), is_bad=is_bad)
    first, second = (request(n, PROMPT, 6, choice=c) for c, n in ((1, "first"), (2, "second")))
    other = request("other", 3, 6, choice=3)
    pair.add(first, second, other)
    assert [c.start for c in pair.step().chunks] == [0]
    assert [c.start for c in pair.step().chunks] == [8, 8]  # the end of the first's prompt, and of the second's
    assert 0 in [c.start for c in pair.step().chunks]
    pair.run()
    ends = {d.id: d for d in pair.deltas if d.finish_reason}
    assert (ends["first"].finish_reason, ends["first"].error_code) == (FinishReason.ERROR, "numerical_error")
    assert pair.tokens("second") == expected_tokens(second, 6)
    assert pair.tokens("other") == expected_tokens(other, 6)
    assert pair.scheduler.pool.num_used == 0
