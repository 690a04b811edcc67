"""Who may queue: by count, by tokens and free pages, by the pace of the queue, and by tenants' shares of it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.fakes import tiny_capacity
from tpqwen.config import ScheduleOptions
from tpqwen.engine.gate import Gate, Place
from tpqwen.errors import Overloaded
from tpqwen.step import StepStats


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def gate(queue_timeout_s: float = 0.0, **options: Any) -> tuple[Gate, Clock]:
    clock = Clock()
    capacity = tiny_capacity(num_blocks=26)  # 25 blocks of 4 tokens
    return Gate(ScheduleOptions(**options), capacity, queue_timeout_s, clock), clock


def refusal(one: Gate, tenant: str = "", tokens: int = 1) -> Overloaded:
    with pytest.raises(Overloaded) as error:
        one.enter(tenant, tokens)
    assert (error.value.status, error.value.code) == (429, "queue_full")
    return error.value


def enter_all(one: Gate, tenant: str = "", tokens: int = 1) -> list[Place]:
    """As many as may."""
    places = []
    while True:
        try:
            places.append(one.enter(tenant, tokens))
        except Overloaded:
            return places


def stats(free: int, cached: int = 0) -> StepStats:
    return StepStats(
        duration_s=0.01, phase="decode", num_tokens=1, num_running=1, num_waiting=0, blocks_used=25 - free - cached,
        blocks_cached=cached, blocks_free=free, preemptions=0, prefix_queried_tokens=0, prefix_hit_tokens=0,
        prompt_tokens=0, output_tokens=1, busy_s=0.0,
    )  # fmt: skip


def test_the_number_of_those_who_wait_is_bounded_and_a_start_makes_room() -> None:
    one, _ = gate(max_waiting=3)
    places = enter_all(one)
    assert len(places) == 3
    assert "3 requests with 3 tokens" in str(refusal(one))
    one.leave(places[0])
    one.leave(places[0])
    assert len(enter_all(one)) == 1


def test_tokens_may_queue_beyond_what_free_pages_hold_and_a_lone_prompt_always_may() -> None:
    one, _ = gate(max_waiting_tokens=50)
    assert len(enter_all(one, tokens=30)) == 5  # 100 free + 50
    one.observe(stats(free=5, cached=5))
    refusal(one)
    one, _ = gate(max_waiting_tokens=50)
    one.observe(stats(free=0))
    place = one.enter("", 1000)
    refusal(one)
    one.leave(place)
    one.observe(stats(free=5, cached=5))
    assert len(enter_all(one, tokens=30)) == 3  # 40 + 50


def test_who_would_wait_too_long_at_the_present_pace_is_refused_with_a_time() -> None:
    one, clock = gate(queue_timeout_s=10.0, max_waiting=1000)
    places = [one.enter("", 1) for _ in range(200)]  # nothing is known of the pace yet
    for place in places[:100]:
        clock.now += 0.1
        one.leave(place)
    error = refusal(one)  # 100 wait, 10 a second start
    assert error.retry_after_s == pytest.approx(10, rel=0.1)
    for place in places[100:130]:
        clock.now += 0.1
        one.leave(place)
    assert len(enter_all(one)) == pytest.approx(10, abs=3)  # 8 s of waiting at most
    for _ in range(50):
        clock.now += 0.1  # nothing starts any more: the pace falls
    assert refusal(one).retry_after_s > 10


def test_a_busy_period_that_is_over_says_nothing_about_the_next() -> None:
    one, clock = gate(queue_timeout_s=1.0, max_waiting=100)
    for place in enter_all(one):
        clock.now += 5.0
        one.leave(place)
    clock.now += 3600
    assert len(enter_all(one)) == 100


def test_requests_that_leave_unserved_do_not_count_for_the_pace() -> None:
    one, _ = gate(queue_timeout_s=10.0, max_waiting=200)
    for place in enter_all(one)[:150]:
        one.leave(place, served=False)
    assert len(enter_all(one)) == 150


def test_a_greedy_tenant_leaves_half_of_the_queue_and_every_tenant_gets_in() -> None:
    one, _ = gate(max_waiting=100)
    assert len(enter_all(one, "noisy")) == 50
    assert "this key's share" in str(refusal(one, "noisy"))
    assert len(enter_all(one, "second")) == 25
    assert len(one._tenants) == 2
    for i in range(25):
        one.enter(f"quiet{i}", 1)
    refusal(one, "last")


def test_a_greedy_tenant_is_bounded_by_tokens_too_but_one_request_it_may_always_have() -> None:
    one, _ = gate(max_waiting=1000, max_waiting_tokens=300)  # and 100 in free pages
    assert len(enter_all(one, "noisy", tokens=10)) == 20
    one.enter("quiet", 150)
    refusal(one, "quiet", 60)


def test_a_quiet_tenant_is_not_refused_for_a_queue_that_it_does_not_wait_behind() -> None:
    one, clock = gate(queue_timeout_s=10.0, max_waiting=1000)
    places = enter_all(one, "noisy")
    for place in places[:100]:
        clock.now += 0.1
        one.leave(place)
    refusal(one, "noisy")
    assert len(enter_all(one, "quiet")) > 20
