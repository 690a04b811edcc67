"""What speculation accepts on the embedded model's own answers, and that it changes none of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.device.local_app import with_app
from tests.device.test_embedded_replies import WEATHER
from tests.http.driver import events
from tpqwen import LLM, SamplingParams
from tpqwen.config import EMBEDDED_MODEL
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


BODIES: list[dict[str, Any]] = [
    {"content": COPYING[0], "stop": ["old man"]},
    {"content": COPYING[0], "max_tokens": 17},
    {"content": COPYING[0], "n": 3, "temperature": 0.7, "seed": 5},
    {"content": COPYING[0], "logprobs": True, "max_tokens": 9},
    {"content": "What is 17 + 25?", "thinking": True},
    {"content": "What is 17 + 25?", "thinking": True, "thinking_token_budget": 11},
    {"content": "What is the weather in Paris?", "tools": [WEATHER], "thinking": True},
]


def test_clients_see_the_same_answers_and_counts_whole_and_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tokens of a sequence come at once: stop strings, limits, marks and usage must not notice."""
    monkeypatch.setattr(Speculation, "_pays", lambda self, bucket: True)

    async def work(client: httpx.AsyncClient) -> list[Any]:
        told: list[Any] = []
        for given in BODIES:
            body = {"temperature": 0, "max_tokens": 60, **given}
            messages = [{"role": "user", "content": body.pop("content")}]
            body |= {"messages": messages, "chat_template_kwargs": {"enable_thinking": body.pop("thinking", False)}}
            answer = await client.post("/v1/chat/completions", json=body)
            assert answer.status_code == 200, answer.text
            whole = answer.json()
            told.append(([_choice(c) for c in whole["choices"]], whole["usage"]))
            more = {"stream": True, "stream_options": {"include_usage": True}}
            streamed = events((await client.post("/v1/chat/completions", json=body | more)).text)
            told.append((_texts(streamed), streamed[-2]["usage"]))
        return told

    folder = Path(EMBEDDED_MODEL)
    off, on = (with_app(folder, work, speculation=how, max_model_len=1024) for how in ("off", "ngram"))
    assert on == off
    (choice,), usage = on[0]
    assert choice["message"]["content"].endswith("and an ") and choice["finish_reason"] == "stop"
    assert on[2][1]["completion_tokens"] == 17 and usage["completion_tokens"] < 60


def _choice(choice: dict[str, Any]) -> dict[str, Any]:
    for call in choice["message"].get("tool_calls") or ():
        del call["id"]
    return choice


def _texts(streamed: list[Any]) -> dict[tuple[int, str], str]:
    """What each choice said in pieces, put together."""
    found: dict[tuple[int, str], str] = {}
    for choice in (c for e in streamed[:-1] for c in e["choices"]):
        for name in ("reasoning", "content"):
            key = (choice["index"], name)
            found[key] = found.get(key, "") + (choice["delta"].get(name) or "")
        for call in choice["delta"].get("tool_calls") or ():
            key = (choice["index"], "arguments")
            found[key] = found.get(key, "") + (call["function"].get("arguments") or "")
    return found
