"""The Python API on the embedded model, in this process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from rich.progress import Progress

from tpqwen import LLM, SamplingParams
from tpqwen.errors import ConfigError, RequestError
from tpqwen.llm import SHOW_PROGRESS_FROM
from tpqwen.request import FinishReason

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(device="cpu", max_model_len=256) as loaded:
        yield loaded


def test_one_prompt_and_many_prompts_give_the_same_answers(llm: LLM) -> None:
    prompts = ["Once upon a time", "The capital of", "1 2 3"]
    together = llm.generate(prompts, GREEDY)
    alone = [llm.generate(p, GREEDY)[0] for p in prompts]
    assert [o.token_ids for o in together] == [o.token_ids for o in alone]
    assert all(o.finish_reason is FinishReason.LENGTH for o in together)
    assert together[0].usage.completion_tokens == 12
    assert together[0].usage.prompt_tokens == len(llm.tokenizer.encode(prompts[0]))
    assert together[0].text == llm.tokenizer.decode(together[0].token_ids)


def test_a_prompt_can_be_scored_alone(llm: LLM) -> None:
    text = "Once upon a time"
    (output,) = llm.generate(text, SamplingParams(max_tokens=0, prompt_logprobs=1))
    assert (output.token_ids, output.text, output.finish_reason) == ([], "", FinishReason.LENGTH)
    scores = output.prompt_logprobs
    assert scores is not None and len(scores) == len(llm.tokenizer.encode(text)) - 1
    assert all(s.logprob <= s.top_logprobs[0] <= 0 for s in scores)


def test_token_ids_are_prompts_too_and_n_gives_several_answers(llm: LLM) -> None:
    ids = llm.tokenizer.encode("Hello")
    outputs = llm.generate(ids, SamplingParams(temperature=1.5, max_tokens=12, seed=5, n=3, ignore_eos=True))
    assert len({tuple(o.token_ids) for o in outputs}) > 1
    again = llm.generate([ids], SamplingParams(temperature=1.5, max_tokens=12, seed=5, n=3, ignore_eos=True))
    assert [o.token_ids for o in outputs] == [o.token_ids for o in again]


def test_a_stream_is_the_answer_in_pieces(llm: LLM) -> None:
    whole = llm.generate("Once upon a time", GREEDY)[0].text
    assert "".join(p.text for p in llm.stream("Once upon a time", GREEDY)) == whole


def test_an_abandoned_stream_ends_its_request(llm: LLM) -> None:
    stream = llm.stream("Once upon", SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert not llm._engine.core.has_work
    llm._engine.core.scheduler.check()


def test_a_second_call_is_refused_while_a_stream_is_open_and_loses_it_nothing(llm: LLM) -> None:
    whole = llm.generate("Once upon a time", GREEDY)[0].text
    stream = llm.stream("Once upon a time", GREEDY)
    begun = next(stream).text
    for call in (lambda: llm.generate("The capital of", GREEDY), lambda: next(llm.stream("1 2 3", GREEDY))):
        with pytest.raises(RequestError, match="one call at a time"):
            call()
    assert begun + "".join(p.text for p in stream) == whole
    assert llm.generate("Once upon a time", GREEDY)[0].text == whole


def test_a_stop_string_ends_the_answer_before_it(llm: LLM) -> None:
    text = llm.generate("Once upon a time", GREEDY)[0].text
    stop = text[len(text) // 2 :][:3]
    stopping = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, stop=(stop,))
    output = llm.generate("Once upon a time", stopping)[0]
    assert output.finish_reason is FinishReason.STOP
    assert output.text == text[: text.index(stop)]
    assert not llm._engine.core.has_work


def test_chat_answers_and_separates_its_thinking(llm: LLM) -> None:
    output = llm.chat([{"role": "user", "content": "What can you do?"}], thinking=False)
    assert output.text
    assert "<think>" not in output.text
    assert output.reasoning == ""


def test_logprobs_come_with_every_token(llm: LLM) -> None:
    output = llm.generate("Hello", SamplingParams(temperature=0.0, max_tokens=5, logprobs=2, ignore_eos=True))[0]
    assert output.logprobs is not None
    assert len(output.logprobs) == 5
    for token, entry in zip(output.token_ids, output.logprobs, strict=True):
        assert entry.top_ids[0] == token
        assert entry.logprob == pytest.approx(entry.top_logprobs[0])


def test_what_cannot_work_is_refused_in_words(llm: LLM) -> None:
    with pytest.raises(RequestError, match="256"):
        llm.generate([[5] * 300], GREEDY)
    with pytest.raises(ConfigError, match="modle"):
        LLM(modle="x")
    with pytest.raises(ConfigError, match="not a folder"):
        LLM("./no/such/folder")


def test_many_prompts_show_a_bar_that_reaches_its_end(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[Progress] = []

    class Recorded(Progress):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            bars.append(self)

    monkeypatch.setattr("tpqwen.llm.Progress", Recorded)
    params = SamplingParams(temperature=0.0, max_tokens=1)
    llm.generate(["one"] * SHOW_PROGRESS_FROM, params)
    llm.generate("one", params)
    assert [bar.disable for bar in bars] == [False, True]
    assert bars[0].finished
