"""Idle steps, in which ranks capture graphs ahead: made while nobody waits, and never in anybody's way."""

from __future__ import annotations

import threading

import pytest

from tests.fakes import FakeExecutor, expected_tokens, tiny_capacity
from tpqwen.engine.core import EngineCore
from tpqwen.engine.loop import EngineLoop
from tpqwen.engine.messages import Add, Batch, Report, Stop, decode_report, encode
from tpqwen.errors import RankDied
from tpqwen.request import GenerateRequest, SamplingParams
from tpqwen.step import StepInput, StepOutput
from tpqwen.transport.channel import QueueChannel

AHEAD = 3


class Counting(FakeExecutor):
    """Counts idle steps."""

    idle = 0

    def submit(self, step: StepInput) -> None:
        super().submit(step)
        self.idle += not step.chunks and not self.decode


def request(name: str = "a") -> GenerateRequest:
    return GenerateRequest(id=name, prompt_ids=[1, 2, 3, 4, 5], params=SamplingParams(), max_tokens=4, seed=1)


def core_over(executor: FakeExecutor) -> EngineCore:
    return EngineCore(executor, executor.start())


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


def test_a_new_group_captures_its_graphs_anew_and_a_draining_one_none() -> None:
    executor = Counting(tiny_capacity(graphs_ahead=1))
    core = core_over(executor)
    core.prepare()
    assert not core.can_prepare
    core.restart(1, executor.capacity)
    assert core.can_prepare
    core.drain()
    assert not core.can_prepare


def test_without_graphs_there_are_no_idle_steps() -> None:
    assert not core_over(Counting(tiny_capacity())).can_prepare


def test_a_rank_that_dies_in_an_idle_step_is_a_rank_lost() -> None:
    class Dying(Counting):
        def collect(self, timeout_s: float) -> StepOutput:
            raise RankDied("gone", rank=0)

    core = core_over(Dying(tiny_capacity(graphs_ahead=1)))
    with pytest.raises(RankDied):
        core.prepare()
    executor = Counting(tiny_capacity(graphs_ahead=1), epoch=1)
    core.restart(1, executor.capacity, executor)
    core.prepare()
    core.add(request())
    assert tokens_of(core) == expected_tokens(request(), 4)


def test_the_loop_prepares_while_nobody_asks_and_then_serves() -> None:
    prepared = threading.Event()

    class Telling(Counting):
        def submit(self, step: StepInput) -> None:
            super().submit(step)
            if self.idle == AHEAD:
                prepared.set()

    executor = Telling(tiny_capacity(graphs_ahead=AHEAD))
    commands, reports = QueueChannel(), QueueChannel()
    thread = threading.Thread(target=EngineLoop(core_over(executor), commands, reports).run, daemon=True)
    thread.start()
    assert prepared.wait(30)
    commands.send(encode(Add(request())), 30)
    found: list[int] = []
    while len(found) < 4:
        data = reports.recv(30)
        assert data is not None
        report: Report = decode_report(data)
        if isinstance(report, Batch):
            for delta in report.deltas:
                found += delta.token_ids
    commands.send(encode(Stop()), 30)
    thread.join(30)
    assert found == expected_tokens(request(), 4) and executor.idle == AHEAD
