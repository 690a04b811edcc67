"""A repair in deterministic mode: what is recomputed has the bits of what was lost, in bf16 too."""

from __future__ import annotations

import pytest

from tests.faults.served import Faults, Served

pytestmark = pytest.mark.ray


def test_bf16_answers_outlive_a_rank_bit_by_bit(faults: Faults) -> None:
    with Served(faults, tp=2, dtype="bfloat16", deterministic=True) as served:
        found = served.survive(("rank 1", "decode", 20, "kill"), count=6)
        assert any(s.resumed for s in found)
        assert [s.logprobs for s in found] == [s.logprobs for s in served.expected(6)]
