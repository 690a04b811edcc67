"""A rank or the engine dies while drafts are in flight: answers go on token for token, and as without speculation."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.served import Faults, Served
from tpqwen.request import GenerateRequest, SamplingParams
from tpqwen.text.sequences import Limits, expand

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TEXT = "The old man mended his nets beside the pier, and three boats lay in the quiet harbour."


class Copying(Served):
    """Requests that repeat much, greedy and seeded, none of which needs the host's say."""

    def requests(self, count: int = 12, max_tokens: int = 96) -> list[GenerateRequest]:
        self._runs += 1
        made = []
        for i in range(count):
            question = f"Copy this text: {TEXT} {i}" if i % 3 else f"Tell me a story about {i} boats."
            prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
            params = SamplingParams(temperature=0.7 * (i % 2), top_k=20, seed=i, max_tokens=max_tokens, ignore_eos=True)
            limits = Limits(self.config.model.max_model_len or 512, 4087, (4089,))
            made += expand(f"{i}-run{self._runs}", self.tokenizer.encode(prompt), params, limits)
        return made


@pytest.fixture(scope="module")
def drafting(faults: Faults) -> Iterator[Served]:
    roomy = {"max_batched_tokens": 256}  # so that as many rows as there are may speculate
    with Copying(faults, tp=2, **roomy) as plain:
        expected = [s.tokens for s in plain.expected(12)]
    with Copying(faults, tp=2, speculation="ngram", **roomy) as found:
        assert [s.tokens for s in found.expected(12)] == expected
        yield found


@pytest.mark.parametrize("at", [1, 3, 6])
@pytest.mark.parametrize(("who", "how"), [("rank 0", "kill"), ("rank 1", "kill"), ("rank 1", "raise")])
def test_a_rank_that_dies_with_drafts_in_flight_costs_no_token(drafting: Served, who: str, how: str, at: int) -> None:
    assert any(s.resumed for s in drafting.survive((who, "draft", at, how)))


@pytest.mark.parametrize("at", [6, 12])
def test_nor_does_an_engine(drafting: Served, at: int) -> None:
    assert any(s.resumed for s in drafting.survive(("engine", "step", at, "kill")))
