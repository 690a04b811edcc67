"""Fair shares between tenants, patience of those who wait, and what a long prompt may cost others."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from tests.control.test_scheduler_random import Run
from tests.fakes import tiny_capacity
from tpqwen.request import Delta, FinishReason, GenerateRequest, SamplingParams
from tpqwen.scheduler.shares import Shares


def request(name: str, tenant: str = "", prompt: int = 8, max_tokens: int = 4, **changes: Any) -> GenerateRequest:
    ids = [(sum(name.encode()) * 31 + i * 7) % 900 + 3 for i in range(prompt)]
    return GenerateRequest(
        id=name, prompt_ids=ids, params=SamplingParams(), max_tokens=max_tokens, seed=1, tenant=tenant, **changes
    )


def one_slot() -> Run:
    return Run(tiny_capacity(num_blocks=100, max_num_seqs=1, max_batched_tokens=32), depth=1, prefix_cache=False)


def test_a_quiet_tenant_goes_next_however_long_the_others_queue_is() -> None:
    run = one_slot()
    for i in range(20):
        run.add(request(f"noisy{i}", "noisy"))
    run.schedule()
    run.collect()
    run.add(request("quiet", "quiet"))
    run.finish()
    assert run.entered.index("quiet") <= 2


def test_tenants_that_always_wait_get_equal_tokens_whatever_the_sizes_of_their_requests() -> None:
    run = one_slot()
    for i in range(60):
        run.add(request(f"small{i}", "small", prompt=6, max_tokens=2))
    for i in range(20):
        run.add(request(f"large{i}", "large", prompt=30, max_tokens=10))
    served = {"small": 0, "large": 0}
    while len(run.entered) < 36:
        if not run.schedule():
            run.collect()
    for name in run.entered[:36]:
        one = run.requests[name]
        served[one.tenant] += len(one.prompt_ids) + one.max_tokens
    assert 0.8 < served["small"] / served["large"] < 1.25
    run.finish()
    run.check_ended()


def test_priority_goes_before_the_share() -> None:
    run = one_slot()
    for i in range(5):
        run.add(request(f"a{i}", "a"))
        run.add(request(f"b{i}", "b", priority=-1))
    run.finish()
    assert run.entered[:5] == [f"b{i}" for i in range(5)]


def test_an_idle_tenant_saves_nothing_up() -> None:
    shares = Shares()
    for i in range(10):
        shares.entered(shares.tag(request(str(i), "busy")))
    late = [shares.tag(request(f"late{i}", "late")) for i in range(3)]
    busy = [shares.tag(request(f"more{i}", "busy")) for i in range(3)]
    assert late[0] > 0
    assert [b - a for a, b in zip(late, busy, strict=True)] == [busy[0] - late[0]] * 3
    assert busy[0] - late[0] <= 12  # one request of 8 + 4 tokens


def test_what_a_request_really_took_is_charged() -> None:
    shares = Shares()
    short, long = request("s", "short", max_tokens=256), request("l", "long", max_tokens=1000)
    shares.tag(short)
    shares.tag(long)
    shares.ended(short, 8)  # aborted while it waited: nothing was taken
    shares.ended(long, 1008)
    assert shares.tag(short) == 8
    assert shares.tag(long) == 1008
    shares.ended(short, 0)
    shares.ended(short, 0)
    assert shares.tag(short) == 8  # never before those that already wait


def test_who_comes_back_complete_is_charged_nothing() -> None:
    run = one_slot()
    run.add(request("busy", "other"))
    run.schedule()
    for i in range(5):  # as after the death of an engine that had told their last tokens
        run.scheduler.add(request(f"done{i}", "a", prompt=30, output_ids=[1, 2, 3, 4]), 0.0)
    run.add(request("b", "b"))
    run.add(request("b2", "b"))
    run.add(request("a", "a"))
    run.finish()
    assert run.entered.index("a") < run.entered.index("b2")


def test_tenants_that_owe_nothing_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tpqwen.scheduler.shares.MANY_TENANTS", 10)
    shares = Shares()
    for i in range(1000):
        shares.entered(shares.tag(request(str(i), f"tenant{i}")) + 100)
    assert len(shares._clocks) <= 10


def expired(run: Run) -> list[Delta]:
    deltas = run.scheduler.expire(run.now)
    run.scheduler.check()
    run._take(deltas)
    return deltas


def test_who_waits_too_long_for_a_first_step_is_given_up_and_nobody_else() -> None:
    run = one_slot()
    run.scheduler._patience.timeout_s = 10.0
    run.add(request("runs", max_tokens=60))
    run.schedule()
    for name in ("waits", "leaves"):
        run.add(request(name))
    run.add(request("resubmitted", output_ids=[5, 6]))
    run.abort("leaves")
    assert expired(run) == []
    run.collect()
    run.now = 11.0
    run.add(request("late"))
    assert expired(run) == []
    run.now = 11.5
    (delta,) = expired(run)
    assert (delta.id, delta.finish_reason, delta.error_code) == ("waits", FinishReason.ERROR, "queue_timeout")
    assert "10 s" in str(delta.error)
    run.scheduler._patience.timeout_s = 0
    run.finish()
    assert run.ended.keys() == run.requests.keys()
    assert run.scheduler.pool.num_used == 0


@pytest.mark.parametrize("seed", range(8))
def test_random_waits_end_once_and_leave_nothing(seed: int) -> None:
    random = Random(seed)
    run = Run(tiny_capacity(num_blocks=40, max_num_seqs=3, max_batched_tokens=16), depth=2)
    run.scheduler._patience.timeout_s = 12.0
    for i in range(120):
        run.add(request(f"r{i}", random.choice("abc"), random.randint(1, 40), random.randint(1, 20)))
        for _ in range(random.randrange(4)):
            if not run.schedule() and run.scheduler.num_in_flight:
                run.collect()
        for delta in expired(run):
            assert delta.index == 0 and run.requests[delta.id].id not in run.entered
    while run.scheduler.has_work or run.scheduler.num_in_flight:
        expired(run)
        if not run.schedule() and run.scheduler.num_in_flight:
            run.collect()
    assert run.ended.keys() == run.requests.keys()
    assert run.scheduler.pool.num_used == 0
    assert {d.finish_reason for d in run.ended.values()} >= {FinishReason.ERROR, FinishReason.LENGTH}


def test_a_32k_prompt_adds_at_most_a_chunk_to_each_step_and_streams_go_on_in_every_one() -> None:
    capacity = tiny_capacity(num_blocks=9000, max_num_seqs=16, max_batched_tokens=2048, max_model_len=33_000)
    run = Run(capacity, depth=2, prefix_cache=False)
    schedule = run.scheduler.schedule
    run.scheduler.schedule = lambda now, gentle: schedule(now, 256)  # type: ignore[assignment, method-assign]
    for i in range(8):
        run.add(request(f"stream{i}", max_tokens=400))
    for _ in range(4):
        run.schedule()
        run.collect()
    before = len(run.executor.steps)
    run.add(request("long", prompt=32_000, max_tokens=2))
    while not run.tokens["long"]:
        run.schedule()
        if run.scheduler.num_in_flight == run.depth:
            run.collect()
    steps = run.executor.steps[before:]
    assert len(steps) >= 32_000 // 256
    assert max(step.num_chunk_tokens for step in steps) == 256
    lengths = [len(run.tokens[f"stream{i}"]) for i in range(8)]
    assert min(lengths) >= len(steps) - 2  # a token in each step but those in flight
    run.finish()
