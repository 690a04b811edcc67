"""Which steps speculate, by what they cost and bring, and what the scheduler makes of the tokens of such a step."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable

import msgspec
import pytest

from tests.control.test_scheduler import ROOMY, Pair, request
from tests.control.test_thinking_budget import budget, expected, thinks
from tests.fakes import FakeExecutor, expected_tokens, hashed_token, tiny_capacity
from tpqwen.config import Config, ScheduleOptions
from tpqwen.engine.core import EngineCore
from tpqwen.engine.deadlines import FLOOR_S, NEW_SHAPE_S, Deadlines
from tpqwen.errors import ConfigError
from tpqwen.request import FinishReason, SamplingParams
from tpqwen.scheduler.scheduler import Scheduler
from tpqwen.scheduler.speculation import LEAST_PAUSE, REFRESH, Speculation
from tpqwen.step import DRAFT_ROWS, Chunk, StepInput, StepStats, packed

COUNT = 7
Yield = Callable[[int], float]  # step -> tokens of a row, if it speculates


def step_of(speculate: int = 0, chunks: tuple[Chunk, ...] = ()) -> StepInput:
    return StepInput(0, 0, (), b"", chunks, None, speculate=speculate)


def stats_of(duration_s: float, rows: int, speculate: int, accepted: int) -> StepStats:
    drafts = rows if speculate else 0
    figures = (duration_s, "decode", rows * (1 + speculate), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    return StepStats(*figures, num_drafts=drafts, draft_tokens=drafts * speculate, accepted_tokens=accepted)


class World:
    """Steps that take as long as is said, of which two are always in flight."""

    def __init__(self, ordinary_s: float, speculative_s: float, tokens: Yield) -> None:
        self.speculation = Speculation(COUNT)
        self.costs = {False: ordinary_s, True: speculative_s}
        self.tokens = tokens
        self.chosen: list[bool] = []
        self.seconds = 0.0
        self.made = 0.0
        self._in_flight: deque[tuple[bool, int, float]] = deque()

    def run(self, steps: int, rows: int = 2) -> World:
        for _ in range(steps):
            chosen = self.speculation.wanted(rows)
            brought = self.tokens(len(self.chosen)) if chosen else 1.0
            self._in_flight.append((chosen, rows, brought))
            self.chosen.append(chosen)
            self.seconds += self.costs[chosen]
            self.made += brought * rows
            if len(self._in_flight) == 2:
                self._collect()
        return self

    def _collect(self) -> None:
        chosen, rows, brought = self._in_flight.popleft()
        accepted = round((brought - 1) * rows)
        stats = stats_of(self.costs[chosen], rows, COUNT if chosen else 0, accepted)
        self.speculation.observe(step_of(COUNT if chosen else 0), stats)

    @property
    def gain(self) -> float:
        """Tokens per second, of what ordinary steps alone would make."""
        return self.made / self.seconds / (self.made_ordinary / (len(self.chosen) * self.costs[False]))

    @property
    def made_ordinary(self) -> float:
        return 2.0 * len(self.chosen)


@pytest.mark.parametrize("price", [1.05, 1.3, 2.0, 6.0])
def test_where_it_does_not_pay_it_is_tried_now_and_then_for_a_hundredth_of_the_time(price: float) -> None:
    world = World(0.002, 0.002 * price, lambda step: 1.0).run(200)
    early, world.chosen = sum(world.chosen), []
    assert early < 40
    world.seconds = world.made = 0.0
    world.run(3000)
    assert sum(world.chosen) >= 2, "it goes on being tried"
    assert world.gain > 0.985


@pytest.mark.parametrize(("price", "tokens"), [(1.1, 1.5), (1.3, 4.0), (2.0, 7.6)])
def test_where_it_pays_nearly_all_steps_do_it(price: float, tokens: float) -> None:
    world = World(0.002, 0.002 * price, lambda step: tokens).run(2 * REFRESH)
    assert sum(world.chosen) > 0.98 * len(world.chosen) - 4
    assert world.gain > 0.95 * tokens / price
    assert not all(world.chosen[REFRESH // 2 :]), "what an ordinary step costs is measured again"


def test_it_begins_soon_when_a_text_begins_to_repeat_and_ends_soon_when_it_does_not() -> None:
    world = World(0.002, 0.0024, lambda step: 6.0 if 400 <= step < 600 else 1.0).run(1000)
    begun = next(step for step in range(400, 600) if all(world.chosen[step : step + 5]))
    assert begun <= 400 + max(LEAST_PAUSE, 20) + 3
    assert sum(world.chosen[begun:600]) > 0.98 * (600 - begun)
    assert sum(world.chosen[600:650]) < 20 and sum(world.chosen[650:]) <= 350 / LEAST_PAUSE + 1


def test_costs_are_known_for_numbers_of_rows_apart() -> None:
    world = World(0.002, 0.0022, lambda step: 3.0).run(60, rows=2)
    assert all(world.chosen[-10:])
    world.costs = {False: 0.002, True: 0.02}
    world.run(60, rows=16)
    assert not any(world.chosen[-5:]), "with many rows it does not pay"
    world.costs = {False: 0.002, True: 0.0022}
    world.run(5, rows=2)
    assert all(world.chosen[-5:]), "and with few it still does"


def test_steps_with_prompts_and_one_slow_step_say_little() -> None:
    speculation = Speculation(COUNT)
    chunk = Chunk(0, 0, packed([1, 2]), True)
    speculation.observe(step_of(chunks=(chunk,)), stats_of(9.0, 2, 0, 0))
    assert not speculation.wanted(2), "an ordinary step is measured first"
    for duration_s in (0.002, 0.002):
        speculation.observe(step_of(), stats_of(duration_s, 2, 0, 0))
    assert speculation.wanted(2)
    for duration_s in (0.0022, 3.0, 0.0022, 0.0022):
        speculation.observe(step_of(COUNT), stats_of(duration_s, 2, COUNT, 2 * 5))
    assert speculation.wanted(2), "one step that compiled something is no reason to give up"


@pytest.mark.parametrize(("rows", "max_tokens", "fits"), [(0, 99, False), (1, 7, False), (1, 8, True), (2, 15, False)])
def test_only_few_rows_and_within_a_steps_tokens(rows: int, max_tokens: int, fits: bool) -> None:
    assert Speculation(COUNT).fits(rows, max_tokens) == fits
    assert Speculation(COUNT).fits(DRAFT_ROWS, 10_000) and not Speculation(COUNT).fits(DRAFT_ROWS + 1, 10_000)


def test_the_first_of_its_kind_has_time_to_be_compiled() -> None:
    deadlines = Deadlines(compiles=True)
    plain = step_of()
    for number in range(3):
        deadlines.of(msgspec.structs.replace(plain, step=number, decode=packed([1, 2])))
        deadlines.observe(msgspec.structs.replace(plain, step=number), 0.01)
    later = [msgspec.structs.replace(step_of(COUNT), step=number) for number in (3, 4)]
    assert [deadlines.of(step) for step in later] == [NEW_SHAPE_S, FLOOR_S]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"speculation": "eagle"}, "speculation must be one of off, ngram, not 'eagle'"),
        ({"speculation": "ngram", "draft_tokens": 16}, "draft_tokens must lie in 1..15, not 16"),
        ({"speculation": "ngram", "draft_tokens": 0}, "draft_tokens must lie in 1..15, not 0"),
        ({"speculation": "ngram", "task": "embed"}, "speculation=ngram drafts output tokens, and task=embed has none"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        Config.load(options, {})


def test_options_reach_the_schedule() -> None:
    assert Config.load({}, {}).schedule.num_drafts == 0
    assert Config.load({"speculation": "ngram"}, {}).schedule.num_drafts == 7
    assert Config.load({}, {"TPQWEN_SPECULATION": "ngram", "TPQWEN_DRAFT_TOKENS": "3"}).schedule.num_drafts == 3
    assert Config.load({"draft_tokens": 3, "task": "embed"}, {}).schedule.num_drafts == 0


class Always(Speculation):
    def wanted(self, num_rows: int) -> bool:
        return True


def drafting(**options: object) -> Pair:
    """Every step that may speculates."""
    pair = Pair(**options)  # type: ignore[arg-type]
    pair.scheduler = Scheduler(pair.executor.capacity, speculation=Always(COUNT))
    return pair


def run(pair: Pair, depth: int) -> None:
    while pair.scheduler.has_work or pair.scheduler.num_in_flight:
        while pair.scheduler.num_in_flight < depth and (step := pair.scheduler.schedule(0.0)) is not None:
            pair.executor.submit(step)
            pair.scheduler.check()
        pair.collect()


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_an_end_token_among_the_drafted_ends_the_sequence_there(depth: int) -> None:
    for length in range(1, 24):
        whole = expected_tokens(request("a", 6, 40), 40)
        pair = drafting()
        pair.add(request("a", 6, 40, end_ids=(whole[length - 1],)), request("b", 9, length))
        run(pair, depth)
        assert pair.tokens("a") == whole[:length]
        ends = {d.id: d for d in pair.deltas if d.finish_reason}
        assert (ends["a"].finish_reason, ends["a"].stop_id) == (FinishReason.STOP, whole[length - 1])
        assert ends["b"].finish_reason is FinishReason.LENGTH and len(pair.tokens("b")) == length
        assert length == 1 or any(step.speculate for step in pair.executor.steps)


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 3, 8])
def test_reasoning_is_closed_at_its_budget_among_drafted_tokens_too(depth: int, tokens: int) -> None:
    pair = drafting(next_token=thinks())
    a, b = request("a", 6, 40, thinking=budget(tokens)), request("b", 9, 20)
    pair.add(a, b)
    run(pair, depth)
    assert pair.tokens("a") == expected(a, thinks())
    assert pair.tokens("b") == expected_tokens(b, 20, thinks())
    assert any(step.speculate for step in pair.executor.steps)


def test_a_bad_row_ends_alone() -> None:
    bad: list[int] = []

    def is_bad(history: list[int], params: object) -> bool:
        bad.append(len(history))
        return len(history) > 12 and history[0] == 97  # of request a

    pair = drafting(is_bad=is_bad)
    pair.add(request("a", 6, 40), request("b", 9, 30))
    run(pair, 2)
    ends = {d.id: d for d in pair.deltas if d.finish_reason}
    assert ends["a"].error_code == "numerical_error" and len(pair.tokens("a")) <= 7
    assert pair.tokens("a") == expected_tokens(request("a", 6, 40), 40)[: len(pair.tokens("a"))]
    assert pair.tokens("b") == expected_tokens(request("b", 9, 30), 30)


def test_nobody_is_preempted_for_drafts() -> None:
    """Eight blocks of four for two sequences of 16: there is no room for drafts beside them at the end."""
    pair = drafting(capacity=tiny_capacity(num_blocks=9, max_batched_tokens=32))
    pair.add(request("a", 4, 12), request("b", 4, 12))
    run(pair, 2)
    assert pair.scheduler.step_stats(0.0, 0.0, None, 0.0).preemptions == 0
    assert {bool(s.speculate) for s in pair.executor.steps if not s.chunks} == {True, False}
    assert all(pair.tokens(n) == expected_tokens(request(n, 4, 12), 12) for n in "ab")


def test_nobody_is_preempted_for_drafts_whose_result_may_free_their_blocks() -> None:
    """Drafts in flight count as accepted, so rows seem to need blocks that there are not; without drafts all fit."""
    shapes = [("a", 8, 13), ("b", 4, 11), ("c", 6, 4), ("d", 8, 7)]
    for make in (drafting, Pair):
        pair = make(capacity=tiny_capacity(num_blocks=16, max_batched_tokens=64))
        pair.add(*(request(*shape) for shape in shapes))
        run(pair, 2)
        assert pair.scheduler.step_stats(0.0, 0.0, None, 0.0).preemptions == 0
        assert all(pair.tokens(n) == expected_tokens(request(n, prompt, out), out) for n, prompt, out in shapes)


def test_a_step_that_is_to_show_what_a_step_takes_drafts_nothing() -> None:
    pair = drafting(capacity=tiny_capacity(num_blocks=200, max_batched_tokens=64))
    pair.add(*(request(f"r{i}", 4, 30) for i in range(6)))
    for _ in range(4):
        pair.executor.submit(step := pair.scheduler.schedule(0.0))
        pair.collect()
    assert step is not None and step.speculate
    pair.add(request("late", 40, 4))
    for gentle, drafted in ((0.0, False), (0.0, False), (40.0, False)):
        pair.executor.submit(step := pair.scheduler.schedule(0.0, gentle))
        assert step is not None and bool(step.speculate) == drafted and bool(step.chunks) == (gentle > 0)
        pair.collect()


def test_rows_that_the_host_has_a_say_in_stop_it_while_they_are_there() -> None:
    pair = drafting()
    pair.add(request("a", 6, 60), request("b", 9, 5, params=SamplingParams(logprobs=1)))
    run(pair, 1)
    kinds = [step.speculate > 0 for step in pair.executor.steps]
    assert kinds[:4] == [False] * 4 and any(kinds[5:])
    assert pair.tokens("a") == expected_tokens(request("a", 6, 60), 60)


def test_the_engine_counts_drafts_and_does_not_take_their_steps_for_decode_steps() -> None:
    executor = FakeExecutor(ROOMY, next_token=hashed_token)
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 0.001
        return now

    core = EngineCore(executor, executor.start(), ScheduleOptions(speculation="ngram", draft_tokens=5), clock=clock)
    core.add(request("a", 6, 80))
    stats = []
    while core.has_work:
        result = core.step()
        stats += [result.stats] if result.stats is not None else []
    drafts = sum(s.num_drafts for s in stats)
    assert drafts and sum(s.draft_tokens for s in stats) == 5 * drafts
    assert 0 < sum(s.accepted_tokens for s in stats) <= 5 * drafts
    assert sum(s.output_tokens for s in stats) == 80
    assert {s.num_tokens for s in stats if s.num_drafts} == {6}
    off = EngineCore(FakeExecutor(ROOMY), ROOMY, ScheduleOptions())
    off.add(request("a", 6, 80))
    while off.has_work:
        off.step()
    assert not any(step.speculate for step in off.executor.steps)  # type: ignore[attr-defined]
