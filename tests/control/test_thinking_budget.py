"""Thinking budgets: the closing tokens take the place of further reasoning, however the sequence is scheduled."""

from __future__ import annotations

from random import Random

import pytest

from tests.control.test_scheduler import Pair, request
from tests.control.test_thinking import TOKENIZER, message
from tests.fakes import NextToken, hashed_token, tiny_capacity
from tpqwen.request import FinishReason, GenerateRequest, ThinkingBudget
from tpqwen.scheduler.scheduler import Scheduler
from tpqwen.scheduler.sequence import row_params
from tpqwen.scheduler.thinking import ThinkingWatch
from tpqwen.text.chat import CLOSING
from tpqwen.text.thinking import State

OPEN, CLOSE, END = 2000, 2001, 2002
SENTENCE = (2010, 2011, CLOSE, 2012)


def budget(tokens: int, inside: bool = False) -> ThinkingBudget:
    return ThinkingBudget(tokens, inside, OPEN, CLOSE, SENTENCE)


def thinks(close_at: int = -1, open_at: int = 0) -> NextToken:
    """Opens the block at one output index, closes it at another, else any token."""

    def next_token(history, params, index):  # type: ignore[no-untyped-def]
        return {open_at: OPEN, close_at: CLOSE}.get(index, hashed_token(history, params, index))

    return next_token


def expected(r: GenerateRequest, next_token: NextToken) -> list[int]:
    """Token by token, without a scheduler."""
    history, params, start = list(r.prompt_ids), row_params(r), len(r.prompt_ids)
    assert r.thinking is not None
    inside, count = r.thinking.inside, 0
    while len(history) - start < r.max_tokens:
        token = next_token(history, params, len(history) - start)
        history.append(token)
        if len(history) - start == 1 and not inside:
            inside = token == OPEN
        elif inside and token == CLOSE:
            inside = False
        elif inside:
            count += 1
            if count == r.thinking.tokens:
                history += SENTENCE
                inside = False
    return history[start : start + r.max_tokens]


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize(
    ("tokens", "inside", "next_token"),
    [
        (3, False, thinks()),
        (3, True, thinks(open_at=-1)),
        (1, False, thinks()),
        (3, False, thinks(close_at=2)),  # closed by itself before
        (3, False, thinks(close_at=4)),  # at the last moment
        (3, False, thinks(open_at=1)),  # not the first token: no block
        (3, False, thinks(open_at=-1)),
    ],
)
def test_reasoning_is_closed_at_its_budget(depth: int, tokens: int, inside: bool, next_token: NextToken) -> None:
    pair = Pair(next_token=next_token)
    requests = [request("a", 6, 20, thinking=budget(tokens, inside)), request("b", 9, 20)]
    pair.add(*requests)
    while pair.scheduler.has_work:
        while pair.scheduler.num_in_flight < depth and (step := pair.scheduler.schedule(0.0)) is not None:
            pair.executor.submit(step)
        pair.collect()
    assert pair.tokens("a") == expected(requests[0], next_token)
    indexes = [d.index for d in pair.deltas if d.id == "a"]
    assert indexes == sorted(set(indexes))
    assert [d.finish_reason for d in pair.deltas if d.id == "a"][-1] is FinishReason.LENGTH
    assert len(pair.tokens("b")) == 20
    assert pair.scheduler.pool.num_used == 0


@pytest.mark.parametrize("max_tokens", range(4, 10))
def test_the_closing_tokens_count_and_are_cut_at_max_tokens(max_tokens: int) -> None:
    pair = Pair(next_token=thinks())
    r = request("a", 6, max_tokens, thinking=budget(3))
    pair.add(r)
    pair.run()
    assert pair.tokens("a") == expected(r, thinks())
    assert len(pair.tokens("a")) == max_tokens
    assert pair.scheduler.step_stats(0.0, 0.0, None, 0.0).output_tokens == max_tokens
    assert pair.deltas[-1].finish_reason is FinishReason.LENGTH
    assert not pair.scheduler.has_work


def test_budgets_hold_in_a_crowd_that_is_preempted() -> None:
    random = Random(0)
    for seed in range(12):
        capacity = tiny_capacity(num_blocks=random.randint(26, 40))
        pair = Pair(capacity, next_token=thinks())
        requests = [
            request(f"{seed}-{i}", random.randint(3, 20), random.randint(8, 40), thinking=budget(random.randint(1, 12)))
            for i in range(8)
        ]
        pair.add(*requests)
        while pair.scheduler.has_work:
            while pair.scheduler.num_in_flight < 3 and (step := pair.scheduler.schedule(0.0)) is not None:
                pair.executor.submit(step)
            pair.collect()
        for r in requests:
            assert pair.tokens(r.id) == expected(r, thinks())


def test_a_resubmitted_sequence_is_watched_from_where_it_was() -> None:
    r = request("a", 6, 20, thinking=budget(5))
    whole = expected(r, thinks())
    for known in range(1, 15):
        pair = Pair(next_token=thinks())
        delta = pair.scheduler.add(request("a", 6, 20, thinking=budget(5), output_ids=whole[:known]), 0.0)
        pair.deltas += [delta] if delta else []
        pair.run()
        if not 6 < known < 6 + len(SENTENCE):  # the sentence is sent in one piece
            assert whole[:known] + pair.tokens("a") == whole


def test_a_watched_sequence_that_ends_is_forgotten() -> None:
    pair = Pair(next_token=thinks())
    pair.add(request("a", thinking=budget(3)), request("b", thinking=budget(30), end_ids=(OPEN,)))
    pair.step()
    assert pair.scheduler.abort("a") is not None
    pair.run()
    assert isinstance(pair.scheduler, Scheduler)
    assert pair.scheduler._watched == set()


def test_the_watch_counts_neither_marks_nor_what_follows() -> None:
    watch = ThinkingWatch(budget(2), [OPEN, 1])
    assert not watch.due
    watch.take(CLOSE)
    watch.take(1)
    watch.take(1)
    assert not watch.due
    assert ThinkingWatch(budget(2), [OPEN, 1, 1]).due


def test_the_closing_sentence_is_reasoning_and_the_answer_begins_after_it() -> None:
    content, reasoning = message(f"<think>\nhm hm{CLOSING}answer", State.UNDECIDED)
    assert content == "answer"
    assert reasoning.startswith("hm hm\n\nConsidering the limited time")
    assert reasoning.endswith("directly now.")
    assert TOKENIZER.encode(CLOSING).count(TOKENIZER.vocabulary.control["</think>"]) == 1
