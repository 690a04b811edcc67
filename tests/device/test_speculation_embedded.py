"""What speculation accepts on the embedded model's own answers, and that it changes none of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from tpqwen import LLM, SamplingParams
from tpqwen.scheduler.speculation import Speculation
from tpqwen.step import StepInput, StepStats

TEXT = (
    "The harbour was quiet in the morning. Three boats lay at the wooden pier, and an old man mended his nets beside "
    "them. He did not look up when the bell of the church began to ring."
)
COPYING = [f"Copy this text: {TEXT}"]
QUOTING = [f"Summarise this paragraph:\n\n{TEXT}", f"{TEXT}\n\nSummarise the text above."]
STORIES = ["Tell me a story about a fox."]
GREEDY = SamplingParams(temperature=0.0, max_tokens=64)
SEEDED = SamplingParams(temperature=0.7, top_k=20, top_p=0.95, seed=7, max_tokens=64)


@dataclass
class Seen:
    """Of the steps that only decode."""

    steps: int = 0
    speculative: int = 0
    rows: int = 0
    accepted: int = 0
    texts: list[list[int]] = field(default_factory=list)

    @property
    def tokens_per_row(self) -> float:
        return 1 + self.accepted / max(self.rows, 1)


class Asked:
    """The model in this process; questions are answered one at a time or all at once."""

    def __init__(self, speculation: str) -> None:
        self.llm = LLM(device="cpu", speculation=speculation, threads=1)

    def answer(self, questions: list[str], params: SamplingParams, *, together: bool = False) -> Seen:
        seen = Seen()

        def note(stats: StepStats) -> None:
            seen.steps += stats.phase == "decode"
            seen.speculative += stats.num_drafts > 0
            seen.rows += stats.num_drafts
            seen.accepted += stats.accepted_tokens

        self.llm._engine.on_stats = note
        ids = [self.llm._chat.prompt([{"role": "user", "content": q}], False).ids for q in questions]
        for batch in [ids] if together else [[i] for i in ids]:
            seen.texts += [o.token_ids for o in self.llm.generate(list(batch), params)]
        return seen


@pytest.fixture(scope="module")
def plain() -> Iterator[Asked]:
    made = Asked("off")
    yield made
    made.llm.close()


@pytest.fixture(scope="module")
def drafting() -> Iterator[Asked]:
    made = Asked("ngram")
    yield made
    made.llm.close()


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize(
    ("questions", "least", "most"),
    [(COPYING, 5.0, 8.0), (QUOTING, 1.7, 8.0), (STORIES, 1.0, 1.6)],
    ids=["copying", "quoting", "stories"],
)
def test_what_is_accepted_follows_what_a_text_repeats(
    plain: Asked,
    drafting: Asked,
    questions: list[str],
    least: float,
    most: float,
    params: SamplingParams,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Measured: 7.6 tokens of a row in a step for copying, 2.2 for quoting, 1.2 for stories."""
    monkeypatch.setattr(Speculation, "_pays", lambda self, bucket: True)
    expected, seen = plain.answer(questions, params), drafting.answer(questions, params)
    assert seen.texts == expected.texts
    assert least <= seen.tokens_per_row <= most
    assert seen.steps == seen.speculative
    assert seen.steps < 1.1 * expected.steps / max(least - 0.5, 1.0)


def test_answers_side_by_side_are_the_same_too(plain: Asked, drafting: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Speculation, "_pays", lambda self, bucket: True)
    questions = COPYING + QUOTING + STORIES + ["Count from 1 to 20.", "What is 17 + 25?"]
    for params in (GREEDY, SEEDED):
        expected = plain.answer(questions, params, together=True)
        seen = drafting.answer(questions, params, together=True)
        assert seen.texts == expected.texts and seen.speculative


@pytest.mark.parametrize(("questions", "on"), [(COPYING, True), (STORIES, False)], ids=["copying", "stories"])
def test_it_turns_itself_on_and_off_by_what_steps_cost(
    drafting: Asked, questions: list[str], on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that take 1 ms, and 1.6 ms with drafts, whatever this machine makes of them."""
    observe, speculation = Speculation.observe, Speculation(7)

    def priced(self: Speculation, step: StepInput, stats: StepStats) -> None:
        stats = StepStats(*(0.0016 if step.speculate else 0.001, *_fields(stats)[1:]))
        observe(self, step, stats)

    monkeypatch.setattr(Speculation, "observe", priced)
    core = drafting.llm._engine.core
    monkeypatch.setattr(core, "_speculation", speculation)
    monkeypatch.setattr(core.scheduler, "_speculation", speculation)
    drafting.answer(questions, GREEDY)
    seen = drafting.answer(questions, GREEDY)
    share = seen.speculative / seen.steps
    assert share > 0.8 if on else share < 0.1


def _fields(stats: StepStats) -> list[object]:
    return [getattr(stats, name) for name in StepStats.__struct_fields__]
