"""The split of reasoning and answer: start states, trimming, and independence of how the stream is cut."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.text_fixture import MARKS, SPECIAL, tokenizer
from tpqwen.request import Delta, FinishReason, SamplingParams, TokenLogprob
from tpqwen.text.pipeline import OutputText, TextDelta
from tpqwen.text.thinking import State, start_state

TOKENIZER = tokenizer()
VOCABULARY = TOKENIZER.vocabulary
END = VOCABULARY.control["<|im_end|>"]
PIECES = ["\n", "\n\n", " ", "a", "STOP", "S", "日", "<think>", "</think>", "<tool_call>", "<|vision_start|>", "hello"]


def cut_deltas(token_ids: list[int], cuts: list[int], reason: FinishReason, scored: bool = True) -> list[Delta]:
    """Deltas of the tokens, cut at the given places; the last one ends with `reason`."""
    borders = [0, *sorted({c for c in cuts if 0 < c < len(token_ids)}), len(token_ids)]
    deltas = []
    for start, end in pairwise(borders):
        ids = token_ids[start:end]
        scores = [TokenLogprob(logprob=-float(t), top_ids=[], top_logprobs=[]) for t in ids]
        deltas.append(Delta(id="x", index=start, token_ids=ids, logprobs=scores if scored else None))
    deltas[-1].finish_reason = reason
    deltas[-1].stop_id = END if reason is FinishReason.STOP else None
    return deltas


def read(output: OutputText, deltas: list[Delta]) -> tuple[Any, ...]:
    parts: list[TextDelta] = []
    for delta in deltas:
        parts.append(output.feed(delta))
        if parts[-1].finish_reason is not None:
            break
    assert [p.finish_reason for p in parts[:-1]] == [None] * (len(parts) - 1)
    return (
        "".join(p.content for p in parts),
        "".join(p.reasoning for p in parts),
        [t for p in parts for t in p.token_ids],
        [(s.token_id, s.scores.logprob, s.offset) for p in parts for s in p.scores],
        parts[-1].finish_reason,
        parts[-1].stop,
        output.num_tokens,
        output.num_reasoning_tokens,
        output.num_stray_marks,
    )


def message(text: str, start: State, end: bool = True, **params: Any) -> tuple[str, str]:
    """(content, reasoning) of scripted text."""
    ids = TOKENIZER.encode(text) + [END] * end
    deltas = cut_deltas(ids, [], FinishReason.STOP if end else FinishReason.LENGTH)
    content, reasoning, *_ = read(OutputText(VOCABULARY, SamplingParams(**params), start), deltas)
    return content, reasoning


@given(
    pieces=st.lists(st.sampled_from(PIECES), max_size=14),
    cuts=st.lists(st.integers(0, 40), max_size=10),
    start=st.sampled_from([*State, None]),
    reason=st.sampled_from([FinishReason.STOP, FinishReason.LENGTH]),
    stop=st.sampled_from([(), ("STOP",), ("\n", "hello")]),
    include=st.booleans(),
    min_tokens=st.sampled_from([0, 3]),
)
@settings(max_examples=250, deadline=None)
def test_any_cutting_gives_the_same_message(
    pieces: list[str],
    cuts: list[int],
    start: State | None,
    reason: FinishReason,
    stop: tuple[str, ...],
    include: bool,
    min_tokens: int,
) -> None:
    params = SamplingParams(stop=stop, include_stop_str_in_output=include, min_tokens=min_tokens, logprobs=0)
    ids = [*TOKENIZER.encode("".join(pieces)), END]
    whole = read(OutputText(VOCABULARY, params, start), cut_deltas(ids, [], reason))
    single = read(OutputText(VOCABULARY, params, start), cut_deltas(ids, list(range(len(ids))), reason))
    some = read(OutputText(VOCABULARY, params, start), cut_deltas(ids, cuts, reason))
    assert whole == single == some
    content, reasoning, tokens, _, *rest = whole
    for at in (cuts, list(range(0, len(ids), 3))):  # nobody asked for scores: tokens may be taken together
        plain = read(OutputText(VOCABULARY, params, start), cut_deltas(ids, at, reason, scored=False))
        assert plain == (content, reasoning, tokens, [], *rest)


@given(pieces=st.lists(st.sampled_from(PIECES), max_size=14), start=st.sampled_from(list(State)))
@settings(max_examples=150, deadline=None)
def test_nothing_is_lost_but_marks_and_white_space(pieces: list[str], start: State) -> None:
    def bare(text: str) -> str:
        return "".join(text.replace("<think>", "").replace("</think>", "").split())

    content, reasoning = message("".join(pieces), start, skip_special_tokens=False)
    assert bare(reasoning + content) == bare("".join(pieces))


@pytest.mark.parametrize(
    ("text", "start", "content", "reasoning"),
    [
        ("<think>\nwhy\n</think>\n\nyes", State.UNDECIDED, "yes", "why"),
        ("\n <think>\nwhy\n\n</think>yes", State.UNDECIDED, "yes", "why"),
        ("<think>\n\n</think>\n\nyes", State.UNDECIDED, "yes", ""),
        ("yes\n", State.UNDECIDED, "yes\n", ""),
        (" \nyes", State.UNDECIDED, " \nyes", ""),
        ("\n", State.UNDECIDED, "\n", ""),
        ("</think>yes", State.UNDECIDED, "yes", ""),
        ("why\n\nmore\n</think>\n\nyes\n\n", State.REASONING, "yes\n\n", "why\n\nmore"),
        ("why <tool_call> more", State.REASONING, "", "why <tool_call> more"),
        ("why <think> more</think>yes", State.REASONING, "yes", "why <think> more"),
        ("\n\nyes", State.CONTENT, "\n\nyes", ""),
        ("a<think>b</think>c</think>d", State.CONTENT, "abcd", ""),
        ("<think>a</think>b<think>c</think>d", State.UNDECIDED, "bcd", "a"),
    ],
)
def test_marks_split_the_stream(text: str, start: State, content: str, reasoning: str) -> None:
    assert message(text, start) == (content, reasoning)
    assert message(text, start, end=False) == (content, reasoning)


def test_stray_marks_are_counted() -> None:
    output = OutputText(VOCABULARY, SamplingParams(), State.CONTENT)
    output.feed(Delta(id="x", index=0, token_ids=TOKENIZER.encode("a</think></think><think>")))
    assert output.num_stray_marks == 3


def test_reasoning_tokens_exclude_the_marks() -> None:
    output = OutputText(VOCABULARY, SamplingParams(), State.UNDECIDED)
    output.feed(Delta(id="x", index=0, token_ids=TOKENIZER.encode("<think>\nwhy\n</think>\n\nyes")))
    assert output.num_reasoning_tokens == len(TOKENIZER.encode("\nwhy\n"))


def test_stop_strings_do_not_act_in_the_reasoning() -> None:
    assert message("<think>\nSTOP\n</think>\n\nyes STOP no", State.UNDECIDED, stop=("STOP",)) == ("yes ", "STOP")


def test_end_token_is_not_text_unless_asked_for() -> None:
    assert message("yes", State.CONTENT) == ("yes", "")
    shown = message("yes", State.CONTENT, include_stop_str_in_output=True, skip_special_tokens=False)
    assert shown == ("yes<|im_end|>", "")


def test_start_state_is_read_from_the_last_turn_only() -> None:
    def state(text: str) -> State:
        return start_state(VOCABULARY, TOKENIZER.encode(text))

    assert state("<|im_start|>assistant\n") is State.UNDECIDED
    assert state("<|im_start|>assistant\n<think>\n") is State.REASONING
    assert state("<|im_start|>assistant\n<think>\n\n</think>\n\n") is State.CONTENT
    assert state("<|im_start|>user\n<think><|im_end|>\n<|im_start|>assistant\n") is State.UNDECIDED
    assert state("<think>") is State.REASONING


def test_model_without_marks_has_content_only() -> None:
    bare = type(VOCABULARY)(VOCABULARY.token_bytes, VOCABULARY.special_ids, {})
    assert start_state(bare, [1, 2]) is State.CONTENT
    assert {*SPECIAL, *MARKS} == set(VOCABULARY.control)
