"""Rows as arrays: who needs blocks, for how long nobody does, and output that runs ahead of its sequence."""

from __future__ import annotations

from tests.fakes import FakeExecutor, expected_tokens, tiny_capacity
from tpqwen.request import GenerateRequest, SamplingParams
from tpqwen.scheduler.rows import AT_ONCE
from tpqwen.scheduler.scheduler import AHEAD, Scheduler
from tpqwen.step import LONG_ROW, StepInput, ints

SIZE = 64


def scheduler_of(num_rows: int, num_blocks: int, max_tokens: int, apart: int) -> tuple[Scheduler, FakeExecutor]:
    """Rows that decode already; prompts differ by `apart` tokens each."""
    capacity = tiny_capacity(
        num_blocks=num_blocks, block_size=SIZE, max_num_seqs=num_rows, max_model_len=2048, max_batched_tokens=8192
    )
    scheduler, executor = Scheduler(capacity, prefix_cache=False), FakeExecutor(capacity, depth=1)
    for i in range(num_rows):
        ids = list(range(10 + apart * i))
        request = GenerateRequest(id=str(i), prompt_ids=ids, params=SamplingParams(), max_tokens=max_tokens, seed=i)
        assert scheduler.add(request, 0.0) is None
    assert run(scheduler, executor).chunks
    return scheduler, executor


def run(scheduler: Scheduler, executor: FakeExecutor) -> StepInput:
    step = scheduler.schedule(0.0)
    assert step is not None
    executor.submit(step)
    scheduler.update(executor.collect(1.0))
    scheduler.check()
    return step


def blocks_of(step: StepInput) -> dict[int, int]:
    """How many blocks each slot is given."""
    slots = ints(step.blocks, -1, 3)[:, 0].tolist()
    return {slot: slots.count(slot) for slot in slots}


def test_with_plenty_of_blocks_most_steps_give_none_and_no_step_gives_many() -> None:
    scheduler, executor = scheduler_of(40, 2000, 1000, apart=5)
    given = [blocks_of(run(scheduler, executor)) for _ in range(600)]
    busy = [g for g in given if g]
    assert len(busy) < 600 / 8
    assert max(len(g) for g in busy) <= AT_ONCE
    assert {n for g in busy for n in g.values()} == {AHEAD}


def test_rows_in_step_are_spread_before_they_run_out() -> None:
    scheduler, executor = scheduler_of(40, 2000, 1000, apart=0)
    given = [blocks_of(run(scheduler, executor)) for _ in range(SIZE)]
    assert [len(g) for g in given if g] == [AT_ONCE, AT_ONCE, 40 - 2 * AT_ONCE]


def test_without_plenty_only_who_has_no_room_gets_a_block_and_nobody_gets_more_than_it_can_use() -> None:
    scheduler, executor = scheduler_of(12, 60, 200, apart=4)
    for _ in range(150):
        rows, full = scheduler.rows, scheduler.rows.capacity == scheduler.rows.computed
        out = {s.slot for s in rows.running if full[s.slot] and rows.left[s.slot]}
        given = blocks_of(run(scheduler, executor))
        assert given.keys() == out and set(given.values()) <= {1}
    plenty, executor = scheduler_of(4, 2000, 70, apart=0)
    given = [g for g in (blocks_of(run(plenty, executor)) for _ in range(69)) if g]
    assert given == [dict.fromkeys(range(4), 1)], "10 + 70 tokens need two blocks"


def test_a_sequences_own_tokens_are_brought_up_to_date_when_somebody_needs_them() -> None:
    scheduler, executor = scheduler_of(3, 200, 50, apart=3)
    for _ in range(20):
        run(scheduler, executor)
    running = scheduler.rows.running
    assert [s.num_output for s in running] == [0, 0, 0] and scheduler.rows.produced[:3].tolist() == [21] * 3
    assert scheduler.rows.up_to_date() == running
    for s in running:
        assert s.tokens[s.num_prompt :].tolist() == expected_tokens(s.request, 21)
    run(scheduler, executor)
    ended = running[1]
    assert scheduler.abort("1") is not None
    assert ended.tokens[ended.num_prompt :].tolist() == expected_tokens(ended.request, 22)


def test_a_row_is_long_from_the_token_after_the_threshold_until_it_ends() -> None:
    capacity = tiny_capacity(num_blocks=200, block_size=SIZE, max_model_len=8192, max_batched_tokens=8192)
    scheduler, executor = Scheduler(capacity, prefix_cache=False), FakeExecutor(capacity, depth=1)
    for name, prompt, output in (("short", 10, 30), ("long", LONG_ROW - 3, 12)):
        ids = [i % 1000 for i in range(prompt)]
        scheduler.add(GenerateRequest(id=name, prompt_ids=ids, params=SamplingParams(), max_tokens=output, seed=0), 0.0)
    steps = [run(scheduler, executor) for _ in range(30)]
    assert not steps[0].wide, "the prompt is computed, and no row decodes"
    assert [step.wide for step in steps[1:]] == [False] * 3 + [True] * 8 + [False] * 18
    assert all(type(step.wide) is bool for step in steps)
    assert not scheduler.idle_step().wide


def test_lengths_are_looked_at_only_when_a_row_can_have_become_long() -> None:
    capacity = tiny_capacity(num_blocks=200, block_size=64, max_model_len=8192, max_batched_tokens=8192)
    scheduler, executor = Scheduler(capacity, prefix_cache=False), FakeExecutor(capacity, depth=1)
    ids = [i % 1000 for i in range(LONG_ROW - 30)]
    scheduler.add(GenerateRequest(id="it", prompt_ids=ids, params=SamplingParams(), max_tokens=300, seed=0), 0.0)
    steps, looks = [], []
    look = scheduler.rows.quiet
    scheduler.rows.quiet = lambda rows: looks.append(len(steps)) or look(rows)  # type: ignore[method-assign,func-returns-value]
    for _ in range(150):
        steps.append(run(scheduler, executor))
    assert [step.wide for step in steps] == [False] * 31 + [True] * 119
    assert len(looks) < 30 and 31 in looks
    scheduler.abort("it")
    assert not scheduler.idle_step().wide, "whatever was seen when it was looked last"
