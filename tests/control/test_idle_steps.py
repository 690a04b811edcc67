"""Idle steps, in which ranks capture graphs ahead: made while nobody waits, never in anybody's way, and never twice
where one has failed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import msgspec
import pytest

from tests.fakes import FakeExecutor, expected_tokens, tiny_capacity
from tpqwen.engine import loop as loop_module
from tpqwen.engine.core import EngineCore
from tpqwen.engine.loop import EngineLoop
from tpqwen.engine.messages import Add, Batch, Drain, Lost, Report, Resume, Stop, decode_report, encode
from tpqwen.errors import EngineError, RankDied
from tpqwen.request import GenerateRequest, SamplingParams
from tpqwen.step import GIVEN_UP, StepInput, StepOutput
from tpqwen.transport.channel import QueueChannel

AHEAD = 3


class Counting(FakeExecutor):
    """Counts idle steps. fails: each of them does. captures: each step that is not idle captures a graph first."""

    idle = 0
    fails: EngineError | None = None
    gives_up = False
    captures = False

    def submit(self, step: StepInput) -> None:
        super().submit(step)
        self.idle += not step.chunks and not self.decode

    def collect(self, timeout_s: float) -> StepOutput:
        output = super().collect(timeout_s)
        step = self.steps[self.num_collected - 1]
        is_idle = not output.tokens and not step.chunks
        if is_idle and self.fails is not None:
            raise self.fails
        left = GIVEN_UP if is_idle and self.gives_up else output.graphs_left
        return msgspec.structs.replace(output, graphs_left=left, captured=is_idle or self.captures)


def request(name: str = "a", count: int = 4) -> GenerateRequest:
    return GenerateRequest(id=name, prompt_ids=[1, 2, 3, 4, 5], params=SamplingParams(), max_tokens=count, seed=1)


def core_over(executor: FakeExecutor, **options: bool) -> EngineCore:
    return EngineCore(executor, executor.start(), **options)


def tokens_of(core: EngineCore) -> list[int]:
    found: list[int] = []
    while core.has_work:
        for delta in core.step().deltas:
            found += delta.token_ids
    return found


def test_there_are_as_many_idle_steps_as_graphs_and_requests_are_the_same_between_them() -> None:
    executor = Counting(tiny_capacity(graphs_ahead=AHEAD))
    core = core_over(executor)
    for _ in range(AHEAD):
        assert core.can_prepare
        core.prepare()
        core.scheduler.check()
        core.add(request())
        assert not core.can_prepare
        assert tokens_of(core) == expected_tokens(request(), 4)
    assert not core.can_prepare and executor.idle == AHEAD


def test_without_graphs_and_while_draining_there_are_no_idle_steps() -> None:
    assert not core_over(Counting(tiny_capacity())).can_prepare
    core = core_over(Counting(tiny_capacity(graphs_ahead=1)))
    core.drain()
    assert not core.can_prepare


def test_a_new_group_captures_its_graphs_anew() -> None:
    executor = Counting(tiny_capacity(graphs_ahead=1))
    core = core_over(executor)
    core.prepare()
    assert not core.can_prepare
    executor.restart(1)
    core.restart(1, executor.capacity)
    assert core.can_prepare
    core.prepare()
    assert not core.can_prepare


@pytest.mark.parametrize("error", [RankDied("gone", rank=0), EngineError("CUDA out of memory")])
def test_one_that_fails_is_the_last_of_its_engine(error: EngineError, caplog: pytest.LogCaptureFixture) -> None:
    executor = Counting(tiny_capacity(graphs_ahead=AHEAD))
    core = core_over(executor)
    executor.fails = error
    with pytest.raises(EngineError):
        core.prepare()
    assert "captured when needed" in caplog.text
    for epoch in (1, 2):
        executor.restart(epoch)
        core.restart(epoch, executor.capacity)
        assert not core.can_prepare
        core.add(request())
        assert tokens_of(core) == expected_tokens(request(), 4)
    assert executor.idle == 1


def test_ranks_without_memory_for_more_are_not_asked_again() -> None:
    executor = Counting(tiny_capacity(graphs_ahead=AHEAD))
    executor.gives_up = True
    core = core_over(executor)
    core.prepare()
    executor.restart(1)
    core.restart(1, executor.capacity)
    assert not core.can_prepare and executor.idle == 1


def test_idle_steps_have_time_to_compile_and_the_first_step_of_a_request_too() -> None:
    executor = Counting(tiny_capacity(graphs_ahead=2))
    core = core_over(executor, compiles=True)
    core.prepare()
    core.prepare()
    core.add(request())
    tokens_of(core)
    assert executor.timeouts[:3] == [180.0, 60.0, 180.0]


@pytest.mark.parametrize("captures", [True, False])
def test_a_step_that_captured_a_graph_is_no_measure(captures: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = Counting(tiny_capacity(graphs_ahead=1))
    executor.captures = captures
    core = core_over(executor)
    paced: list[int] = []
    measured: list[tuple[int, bool]] = []
    monkeypatch.setattr(core._pace, "observe", lambda step, stats: paced.append(step.step))
    monkeypatch.setattr(core._deadlines, "observe", lambda step, s, *, captured: measured.append((step.step, captured)))
    core.prepare()
    core.add(request())
    tokens_of(core)
    numbers = [step.step for step in executor.steps[1:]]
    assert measured == [(number, captures) for number in numbers]
    assert paced == ([] if captures else numbers)


class Engine:
    """An engine's loop in a thread, with whoever repairs its ranks."""

    def __init__(self, executor: Counting) -> None:
        self.executor = executor
        self.commands, self.reports = QueueChannel(), QueueChannel()
        self.loop = EngineLoop(core_over(executor), self.commands, self.reports, self.attach)
        self.thread = threading.Thread(target=self.loop.run, daemon=True)

    def attach(self, command: Resume) -> FakeExecutor:
        self.executor.restart(command.epoch)
        return self.executor

    def told(self) -> Report:
        data = self.reports.recv(30)
        assert data is not None
        return decode_report(data)

    def ask(self, made: GenerateRequest) -> None:
        self.commands.send(encode(Add(made)), 30)

    def answers(self, made: GenerateRequest) -> bool:
        """Whether the next tokens are the whole right answer. No idle step is reported meanwhile."""
        found: list[int] = []
        while len(found) < made.max_tokens:
            report = self.told()
            if isinstance(report, Batch):
                assert report.stats is None or report.stats.num_tokens, "an idle step was counted"
                for delta in report.deltas:
                    found += delta.token_ids
        return found == expected_tokens(made, made.max_tokens)


@pytest.fixture
def started() -> Iterator[Callable[[Counting], Engine]]:
    """Starts engines, and ends them."""
    engines: list[Engine] = []

    def start(executor: Counting) -> Engine:
        engines.append(Engine(executor))
        engines[-1].thread.start()
        return engines[-1]

    yield start
    for engine in engines:
        engine.commands.send(encode(Stop()), 30)
        engine.thread.join(30)
        assert not engine.thread.is_alive()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_the_loop_prepares_at_once_while_nobody_has_come_and_then_serves(
    started: Callable[[Counting], Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_module, "LULL_S", 3600.0)
    executor = Counting(tiny_capacity(graphs_ahead=AHEAD))
    engine = started(executor)
    until(lambda: executor.idle == AHEAD)
    engine.ask(request())
    assert engine.answers(request())


def test_who_comes_during_an_idle_step_is_served_right_after_it_and_a_lull_is_waited_for(
    started: Callable[[Counting], Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_module, "LULL_S", 3600.0)
    entered, go = threading.Event(), threading.Event()

    class Slow(Counting):
        def collect(self, timeout_s: float) -> StepOutput:
            if self.idle == 1 and not go.is_set():
                entered.set()
                assert go.wait(30)
            return super().collect(timeout_s)

    executor = Slow(tiny_capacity(graphs_ahead=AHEAD))
    engine = started(executor)
    assert entered.wait(30)
    engine.ask(request())
    go.set()
    assert engine.answers(request())
    assert executor.idle == 1
    until(lambda: engine.loop._wait_s > 0.0)
    assert executor.idle == 1, "as long as the lull lasts"


def test_after_a_slow_capture_a_longer_lull_is_waited_for() -> None:
    executor = Counting(tiny_capacity(graphs_ahead=AHEAD))
    engine = Engine(executor)
    engine.loop._idle_step_s = 2.0
    engine.loop._core.add(request())
    while engine.loop._core.has_work:
        engine.loop._step()
    assert 1.0 < engine.loop._lull_ends - time.monotonic() <= 8.0
    assert 0.0 < engine.loop._wait_s <= 0.5


def test_requests_that_come_now_and_then_do_not_put_off_idle_steps_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """One idle step was slow, and then somebody asks before each lull has ended."""
    monkeypatch.setattr(loop_module, "LULL_S", 0.0)
    engine = Engine(Counting(tiny_capacity(graphs_ahead=AHEAD)))
    engine.loop._idle_step_s = 1e6
    engine.loop._lull_ends = time.monotonic() + 1e6
    engine.thread.start()
    for number in range(40):
        engine.ask(request(str(number)))
        assert engine.answers(request(str(number)))
        until(lambda: engine.loop._rests)
    until(lambda: engine.executor.idle == AHEAD)
    engine.commands.send(encode(Stop()), 30)
    engine.thread.join(30)


def test_a_failed_capture_costs_one_repair_and_the_engine_goes_on(started: Callable[[Counting], Engine]) -> None:
    executor = Counting(tiny_capacity(graphs_ahead=AHEAD))
    executor.fails = RankDied("rank 0 failed: CUDA out of memory", rank=0)
    engine = started(executor)
    report = engine.told()
    assert isinstance(report, Lost) and report.ranks == [0]
    for epoch in (1, 2):
        engine.commands.send(encode(Resume(epoch, executor.capacity, [])), 30)
        engine.ask(request(f"after {epoch}"))
        assert engine.answers(request(f"after {epoch}"))
    assert executor.idle == 1


def test_where_nobody_repairs_nothing_is_risked() -> None:
    executor = Counting(tiny_capacity(graphs_ahead=AHEAD))
    loop = EngineLoop(core_over(executor), QueueChannel(), QueueChannel())
    assert loop._core.can_prepare and loop._wait_s > 0.0


def test_there_is_no_idle_step_after_stop_or_drain() -> None:
    for last in (Stop(), Drain()):
        executor = Counting(tiny_capacity(graphs_ahead=AHEAD))
        engine = Engine(executor)
        engine.commands.send(encode(last), 30)
        if isinstance(last, Drain):
            engine.commands.send(encode(Stop()), 30)
        engine.loop.run()
        assert executor.idle == 0
