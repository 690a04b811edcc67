"""Engine loop and client while ranks or the engine itself are replaced: every stream goes on exactly where it was."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import aclosing
from types import SimpleNamespace
from typing import Any

import pytest

from tests.control.test_engine_client import deltas_of, request, run, tokens_of, until
from tests.fakes import FakeExecutor, expected_tokens, tiny_capacity
from tpqwen.config import ScheduleOptions
from tpqwen.engine import client as client_module
from tpqwen.engine import protocol
from tpqwen.engine.client import EngineClient
from tpqwen.engine.core import EngineCore
from tpqwen.engine.loop import EngineLoop
from tpqwen.engine.messages import (
    Add,
    Batch,
    Dead,
    Lost,
    RanksLost,
    Resume,
    Resumed,
    Started,
    Stop,
    decode_command,
    decode_report,
    encode,
)
from tpqwen.engine.protocol import EngineState
from tpqwen.errors import EngineError, RankDied
from tpqwen.request import Delta, Deltas, FinishReason, Pooling
from tpqwen.step import packed
from tpqwen.transport.channel import QueueChannel


def single(name: str, index: int, token: int) -> Deltas:
    return Deltas([name], packed([index]), packed([token]))


class Engine:
    """An engine thread over fake ranks whose faults are repaired by whoever calls `resume`."""

    def __init__(self, faults: dict[int, Exception] | None = None, epoch: int = 0) -> None:
        self.executor = FakeExecutor(epoch=epoch, faults=faults)
        self.commands, self.reports = QueueChannel(), QueueChannel()
        self.refused_attaches = 0
        core = EngineCore(self.executor, self.executor.capacity, epoch=epoch)
        self.loop = EngineLoop(core, self.commands, self.reports, self.attach)
        self.thread = threading.Thread(target=self.loop.run, name="engine", daemon=True)
        self.thread.start()

    def attach(self, command: Resume) -> FakeExecutor:
        if self.refused_attaches:
            self.refused_attaches -= 1
            raise ConnectionError("the ring's writer is gone")
        self.executor.restart(command.epoch)
        return self.executor


class Owner:
    """The replica's side: notes faults and what was resumed."""

    def __init__(self, engine: Engine) -> None:
        self.faults: list[Lost | Dead] = []
        self.resumed: list[Resumed] = []
        self.client = EngineClient(
            engine.commands,
            engine.reports,
            tiny_capacity(),
            ScheduleOptions(),
            on_fault=self.faults.append,
            on_resumed=self.resumed.append,
        )

    async def fault(self) -> Lost | Dead:
        await until(lambda: bool(self.faults))
        return self.faults.pop(0)

    def resume(self, epoch: int) -> None:
        self.client.send(Resume(epoch, tiny_capacity(), []))


def repaired(test: Callable[[Engine, Owner], Any], faults: dict[int, Exception]) -> None:
    async def main() -> None:
        engine = Engine(faults)
        owner = Owner(engine)
        try:
            await test(engine, owner)
        finally:
            await owner.client.close()
            await asyncio.to_thread(engine.thread.join, 10)

    run(main)


@pytest.mark.parametrize(
    "error", [RankDied("rank 1 was killed", rank=1), EngineError("out of memory", code="rank_dead")]
)
def test_lost_ranks_are_told_once_and_every_stream_goes_on_after_resume(error: EngineError) -> None:
    async def test(engine: Engine, owner: Owner) -> None:
        requests = [request(f"r{i}", 5, 40) for i in range(12)]
        tasks = [asyncio.create_task(deltas_of(owner.client, r)) for r in requests]
        lost = await owner.fault()
        assert isinstance(lost, Lost)
        assert (lost.epoch, lost.reason, lost.code) == (0, str(error), "rank_dead")
        assert lost.ranks == ([1] if isinstance(error, RankDied) else [])
        assert engine.executor.stopped
        late = request("late", 5, 10)  # comes while nothing runs
        tasks.append(asyncio.create_task(deltas_of(owner.client, late)))
        owner.client.send(RanksLost("rank 0 died too", 0, 0))
        await asyncio.sleep(0)
        owner.resume(1)
        for one, deltas in zip([*requests, late], await asyncio.gather(*tasks), strict=True):
            assert tokens_of(deltas) == expected_tokens(one, one.max_tokens)
        await until(lambda: bool(owner.resumed))
        assert [r.epoch for r in owner.resumed] == [1] and not owner.faults

    repaired(test, {9: error})


def test_who_leaves_during_a_repair_is_not_recomputed() -> None:
    async def test(engine: Engine, owner: Owner) -> None:
        async with aclosing(owner.client.generate(request("leaves", 5, 60))) as stream:
            async for _ in stream:
                break
            await owner.fault()
        owner.resume(1)
        await until(lambda: bool(owner.resumed))
        assert not any(step.epoch for step in engine.executor.steps)

    repaired(test, {9: RankDied("rank 1 died", rank=1)})


def test_ranks_that_cannot_be_reached_after_all_are_lost_again() -> None:
    async def test(engine: Engine, owner: Owner) -> None:
        engine.refused_attaches = 1
        one = request("one", 5, 30)
        task = asyncio.create_task(deltas_of(owner.client, one))
        assert (await owner.fault()).epoch == 0
        owner.resume(1)
        lost = await owner.fault()
        assert isinstance(lost, Lost) and lost.epoch == 1 and "writer is gone" in lost.reason
        owner.resume(2)
        assert tokens_of(await task) == expected_tokens(one, 30)

    repaired(test, {9: RankDied("rank 1 died", rank=1)})


def test_a_death_of_an_older_group_is_no_news() -> None:
    async def test(engine: Engine, owner: Owner) -> None:
        await until(lambda: owner.client.num_open == 0)
        owner.client.send(RanksLost("rank 1 died", 1, 7))
        one = request("one", 5, 30)
        assert tokens_of(await deltas_of(owner.client, one)) == expected_tokens(one, 30)
        assert not owner.faults

    repaired(test, {})


@pytest.mark.parametrize("death", ["told", "silent"])
def test_a_new_engine_goes_on_with_what_every_client_has_seen(death: str) -> None:
    async def test(engine: Engine, owner: Owner) -> None:
        requests = [request(f"r{i}", 5, 40) for i in range(6)]
        tasks = [asyncio.create_task(deltas_of(owner.client, r)) for r in requests]
        dead = await owner.fault()
        assert isinstance(dead, Dead) if death == "told" else isinstance(dead, Lost)
        owner.client.degrade("the engine restarting")
        owner.client.detach()
        late = request("late", 5, 10)
        tasks.append(asyncio.create_task(deltas_of(owner.client, late)))
        await asyncio.sleep(0)
        assert not any(t.done() for t in tasks)
        second = Engine(epoch=3)
        owner.client.reattach(second.commands, second.reports, tiny_capacity())
        owner.resume(3)
        for one, deltas in zip([*requests, late], await asyncio.gather(*tasks), strict=True):
            assert tokens_of(deltas) == expected_tokens(one, one.max_tokens)
            assert sum(d.queue_s is not None for d in deltas) == 1
            assert deltas[-1].resumed == (one is not late)
        await until(lambda: bool(owner.resumed))
        assert owner.client.state.name == "degraded"
        owner.client.recovered()
        assert owner.client.state == EngineState("ready")

    fault = ZeroDivisionError("a bug") if death == "told" else RankDied("rank 0 died", rank=0)
    repaired(test, {9: fault})


def test_a_token_lost_or_repeated_on_the_way_ends_the_request_instead_of_spoiling_it() -> None:
    async def main() -> None:
        commands, reports = QueueChannel(), QueueChannel()
        client = EngineClient(commands, reports, tiny_capacity(), ScheduleOptions())
        task = asyncio.create_task(deltas_of(client, request("one")))
        await until(lambda: client.num_open == 1)
        reports.send(encode(Batch(single("one", 0, 5))), 1.0)
        reports.send(encode(Batch(single("one", 2, 6))), 1.0)
        deltas = await task
        assert [d.token_ids for d in deltas] == [[5], []]
        assert (deltas[-1].finish_reason, deltas[-1].error_code) == (FinishReason.ERROR, "internal")
        kinds = []
        while (data := commands.recv(0.0)) is not None:
            kinds.append(type(decode_command(data)).__name__)
        assert kinds == ["Add", "Abort"]
        await client.close()

    run(main)


def test_a_repair_queues_new_requests_for_half_a_minute_and_then_refuses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        client = EngineClient(QueueChannel(), QueueChannel(), tiny_capacity(), ScheduleOptions())
        client.degrade("rank 1 restarting: rank 1 died")
        client.degrade("rank 0 restarting: rank 0 died")
        assert client.state == EngineState("degraded", "rank 0 restarting: rank 0 died")
        assert client.state.accepts
        later = time.monotonic() + 31
        monkeypatch.setattr(protocol, "time", SimpleNamespace(monotonic=lambda: later))  # not the event loop's
        assert not client.state.accepts
        with pytest.raises(EngineError, match="rank 0 restarting") as caught:
            await deltas_of(client, request("late"))
        assert (caught.value.code, caught.value.status) == ("rank_dead", 503)
        client.recovered()
        assert client.state.accepts
        client.drain()
        client.degrade("rank 1 restarting")
        assert client.state.name == "draining"
        await client.close()

    run(main)


def told(commands: QueueChannel) -> list[tuple[str, str]]:
    """(kind, request id) of every command that was sent."""
    found = []
    while (data := commands.recv(0.0)) is not None:
        command = decode_command(data)
        found.append((type(command).__name__, command.request.id if isinstance(command, Add) else ""))
    return found


@pytest.mark.parametrize(
    "end",
    [
        {"finish_reason": FinishReason.LENGTH},
        {"finish_reason": FinishReason.ERROR, "error": "NaN", "error_code": "numerical_error"},
    ],
)
def test_what_has_ended_but_was_not_read_yet_is_neither_waited_for_nor_begun_again(
    end: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        reports = QueueChannel()
        client = EngineClient(QueueChannel(), reports, tiny_capacity(), ScheduleOptions())
        async with aclosing(client.generate(request("one", max_tokens=2))) as stream:
            first = asyncio.ensure_future(anext(stream))
            await until(lambda: client.num_open == 1)
            reports.send(encode(Batch(single("one", 0, 5))), 1.0)
            assert (await first).token_ids == [5]
            reports.send(encode(Batch(Deltas(others=[Delta(id="one", index=1, token_ids=[], **end)]))), 1.0)
            await until(lambda: client.silent_s == 0.0)
            later = time.monotonic() + 1000
            monkeypatch.setattr(client_module, "time", SimpleNamespace(monotonic=lambda: later))
            assert client.silent_s == 0.0 and client.num_open == 1
            late = asyncio.create_task(deltas_of(client, request("late")))
            await until(lambda: client.num_open == 2)
            assert client.silent_s == 0.0
            commands = QueueChannel()
            client.reattach(commands, QueueChannel(), tiny_capacity())
            await asyncio.sleep(0)
            assert told(commands) == [("Add", "late")]
            rest = [d async for d in stream]
            assert [d.finish_reason for d in rest] == [end["finish_reason"]]
        await client.close()
        assert (await late)[-1].error_code == "shut_down"

    run(main)


def test_nobody_is_silent_during_a_repair_not_even_while_draining(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        client = EngineClient(QueueChannel(), QueueChannel(), tiny_capacity(), ScheduleOptions())
        task = asyncio.create_task(deltas_of(client, request("one")))
        await until(lambda: client.num_open == 1)
        later = time.monotonic() + 1000
        monkeypatch.setattr(client_module, "time", SimpleNamespace(monotonic=lambda: later))
        client.drain()
        assert client.silent_s > 900
        client.degrade("the engine restarting: it has said nothing for 240 s")
        assert client.state.name == "draining" and client.silent_s == 0.0
        client.reattach(QueueChannel(), QueueChannel(), tiny_capacity())
        client.recovered()
        assert client.silent_s == 0.0
        await client.close()
        assert (await task)[-1].error_code == "shut_down"

    run(main)


def test_an_engine_that_got_its_ranks_back_and_says_nothing_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        reports = QueueChannel()
        client = EngineClient(QueueChannel(), reports, tiny_capacity(), ScheduleOptions())
        client.degrade("rank 1 restarting: rank 1 died")
        now = time.monotonic()
        monkeypatch.setattr(client_module, "time", SimpleNamespace(monotonic=lambda: now))
        now += 1000
        assert client.silent_s == 0.0, "it has no ranks"
        client.send(Resume(2, tiny_capacity(), []))
        assert client.silent_s == 0.0
        now += 300
        assert client.state.name == "degraded" and client.silent_s == 300.0, (
            "nobody asks for anything, yet it owes a word"
        )
        client.degrade("the engine restarting: it has said nothing for 300 s")
        assert client.silent_s == 0.0
        client.send(Resume(3, tiny_capacity(), []))
        reports.send(encode(Resumed(3, 0.1)), 1.0)
        now += 300
        await until(lambda: client.silent_s == 0.0)
        await client.close()

    run(main)


def test_a_prompt_that_ends_the_engine_before_its_first_token_uses_up_its_crashes() -> None:
    """The others were waiting, so they have been in no crash."""

    async def test(engine: Engine, owner: Owner) -> None:
        poison = asyncio.create_task(deltas_of(owner.client, request("poison", 5, 10)))
        for epoch in (1, 2, 3):
            assert isinstance(await owner.fault(), Dead)
            owner.client.degrade("the engine restarting")
            owner.client.detach()
            if epoch == 1:
                late = asyncio.create_task(deltas_of(owner.client, request("late", 5, 10)))
                await asyncio.sleep(0)
            again = Engine({1: ZeroDivisionError("a bug")} if epoch < 3 else None, epoch=epoch)
            owner.client.reattach(again.commands, again.reports, tiny_capacity())
            owner.resume(epoch)
        ended = (await poison)[-1]
        assert (ended.finish_reason, ended.error_code) == (FinishReason.ERROR, "crash_budget")
        deltas = await late
        assert tokens_of(deltas) == expected_tokens(request("late", 5, 10), 10)
        assert deltas[-1].resumed <= 1, "once in the poison's company, then it waited"

    repaired(test, {1: ZeroDivisionError("a bug")})


def test_a_request_that_cannot_even_be_queued_has_been_in_that_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(engine: Engine, owner: Owner) -> None:
        def add(_: Any) -> None:
            raise KeyError("a bug")

        monkeypatch.setattr(engine.loop._core, "add", add)
        task = asyncio.create_task(deltas_of(owner.client, request("poison", crashes=2)))
        assert isinstance(await owner.fault(), Dead)
        owner.client.degrade("the engine restarting")
        second = Engine(epoch=1)
        owner.client.reattach(second.commands, second.reports, tiny_capacity())
        assert (await task)[-1].error_code == "crash_budget"

    repaired(test, {})


def test_prompts_alone_show_too_that_the_ranks_are_back() -> None:
    engine = Engine({3: RankDied("rank 1 died", rank=1)})
    for i in range(80):  # at most three of them fit into a step
        engine.commands.send(encode(Add(request(f"r{i}", 5, 0, pooling=Pooling()))), 1.0)
    kinds: list[str] = []
    ended = 0
    while "Lost" not in kinds:
        kinds.append(type(decode_report(engine.reports.recv(10.0) or b"")).__name__)
    engine.commands.send(encode(Resume(1, tiny_capacity(), [])), 1.0)
    while not isinstance(report := decode_report(engine.reports.recv(10.0) or b""), Resumed):
        assert isinstance(report, Batch | Started)
        ended += sum(d.finish_reason is not None for d in getattr(report, "deltas", ()))
    assert 0 < ended < 10
    engine.commands.send(encode(Stop()), 1.0)
    engine.thread.join(10)
