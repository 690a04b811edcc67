"""enable_thinking, reasoning_effort and thinking_token_budget: what they ask of prompt and engine, what they refuse."""

from __future__ import annotations

from typing import Any

import pytest

from tests.http.driver import CHAT, HELLO, post
from tests.http.fake_engine import ids, make_server
from tpqwen.request import ThinkingBudget
from tpqwen.text.chat import CLOSING

CLOSED = "<think>\n\n</think>\n\n"


def asked(variant: str = "hybrid", **body: Any) -> tuple[bool, ThinkingBudget | None, float]:
    """(whether the prompt closes the block, the engine's budget, temperature) of an accepted request."""
    server = make_server(variant=variant)
    answer = post(server.app, CHAT, messages=HELLO, **body)
    assert answer.status_code == 200, answer.text
    request = server.engine.requests[0]
    tail = ids(CLOSED, variant)
    return request.prompt_ids[-len(tail) :] == tail, request.thinking, request.params.temperature


def test_efforts_switch_and_limit_the_thinking() -> None:
    budgets = {"minimal": 1024, "low": 2048, "medium": 8192, "high": None, "xhigh": None}
    for effort, tokens in budgets.items():
        closed, budget, temperature = asked(reasoning_effort=effort)
        assert (closed, temperature) == (False, 0.6)
        assert (budget.tokens if budget else None) == tokens
    assert asked(reasoning_effort="none") == (True, None, 0.7)
    assert asked("instruct", reasoning_effort="none")[:2] == (False, None)


def test_a_budget_reaches_the_engine_with_the_models_marks() -> None:
    control = make_server().chat.vocabulary.control
    marks = (control["<think>"], control["</think>"], tuple(ids(CLOSING)))
    assert asked(thinking_token_budget=7)[1] == ThinkingBudget(7, False, *marks)
    assert asked("thinking", thinking_token_budget=7)[1] == ThinkingBudget(7, True, *marks)
    assert asked(reasoning_effort="low", thinking_token_budget=9)[1] == ThinkingBudget(9, False, *marks)
    assert asked(reasoning_effort="high", chat_template_kwargs={"enable_thinking": True})[1] is None


@pytest.mark.parametrize(
    ("variant", "body", "param"),
    [
        ("hybrid", {"reasoning_effort": "much"}, "reasoning_effort"),
        ("hybrid", {"reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": False}}, "reasoning_effort"),
        ("hybrid", {"reasoning_effort": "none", "thinking_token_budget": 5}, "thinking_token_budget"),
        (
            "hybrid",
            {"thinking_token_budget": 5, "chat_template_kwargs": {"enable_thinking": False}},
            "thinking_token_budget",
        ),
        ("hybrid", {"thinking_token_budget": 0}, "thinking_token_budget"),
        ("instruct", {"reasoning_effort": "low"}, "reasoning_effort"),
        ("instruct", {"thinking_token_budget": 5}, "thinking_token_budget"),
        ("thinking", {"reasoning_effort": "none"}, "reasoning_effort"),
        ("non-thinking", {"thinking_token_budget": 5}, "thinking_token_budget"),
    ],
)
def test_what_the_model_or_the_fields_exclude_is_refused(variant: str, body: dict[str, Any], param: str) -> None:
    answer = post(make_server(variant=variant).app, CHAT, messages=HELLO, **body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_usage_counts_the_reasoning() -> None:
    server = make_server(lambda request: ids("<think>\nhm hm\n</think>\n\nyes"))
    usage = post(server.app, CHAT, messages=HELLO).json()["usage"]
    assert usage["completion_tokens_details"]["reasoning_tokens"] == len(ids("\nhm hm\n"))
