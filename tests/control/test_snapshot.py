"""What people who look on are shown: made from the scheduler on request, and never in the way of a step."""

from __future__ import annotations

import asyncio
import threading
import time

from tests.control.test_engine_client import SlowExecutor, deltas_of, engine, request, run, until
from tests.control.test_engine_repair import Engine, Owner
from tests.control.test_scheduler import Pair
from tests.control.test_scheduler import request as sequence
from tests.fakes import FakeExecutor, expected_tokens, tiny_capacity
from tpqwen.config import ScheduleOptions
from tpqwen.engine.client import EngineClient
from tpqwen.engine.messages import Look, Lost, decode_command
from tpqwen.errors import RankDied
from tpqwen.readings import RankLoad, Readings
from tpqwen.scheduler.snapshot import snapshot
from tpqwen.step import RankStats, SlotView, Snapshot
from tpqwen.transport.channel import QueueChannel


def test_a_snapshot_says_phase_and_length_of_every_slot_and_changes_nothing() -> None:
    pair = Pair(tiny_capacity(max_num_seqs=2))
    pair.add(sequence("a", 20), sequence("b", 5), sequence("c", 7))
    assert snapshot(pair.scheduler) == Snapshot(2, [], 0, 0, 32, 3, 32)
    pair.step()  # 16 of a's prompt
    assert snapshot(pair.scheduler).slots == [SlotView(0, "prefill", 20, 16)]
    pair.step()  # the rest of it, and b's
    seen = snapshot(pair.scheduler)
    assert seen.slots == [SlotView(0, "decode", 21, 20), SlotView(1, "decode", 6, 5)]
    assert (seen.num_waiting, seen.waiting_tokens) == (1, 7)
    assert seen.blocks_used + seen.blocks_cached + seen.blocks_free == 32
    assert seen == snapshot(pair.scheduler)
    pair.scheduler.check()


def test_the_engine_answers_between_steps_and_only_when_asked() -> None:
    async def main() -> None:
        executor = SlowExecutor()
        async with engine(executor) as client:
            idle = await client.look(10.0)
            assert idle is not None and idle.slots == [] and idle.num_slots == 8
            task = asyncio.create_task(deltas_of(client, request("a", 6, 20)))
            executor.go.release(3)
            await until(lambda: client.work.steps == 3)
            asked = asyncio.create_task(client.look(10.0))
            for _ in range(2):  # turns of the loop: it is asked, it goes out; before the engine may go on
                await asyncio.sleep(0)
            executor.go.release(100)
            seen = await asked
            assert seen is not None and [s.phase for s in seen.slots] == ["decode"] and seen.slots[0].num_tokens > 6
            await task
            await until(lambda: client.work.tokens == 20)
            assert client.work.steps >= 20 and client.work.seconds > 0

    run(main)


def test_a_question_that_is_open_is_not_asked_again_and_is_no_sign_of_life() -> None:
    async def main() -> None:
        commands, reports = QueueChannel(), QueueChannel()
        client = EngineClient(commands, reports, tiny_capacity(), ScheduleOptions())
        assert [await client.look(0.01) for _ in range(3)] == [None] * 3
        data = commands.recv(1.0)
        assert data is not None and decode_command(data) == Look() and not commands.poll()
        client.detach()  # the engine has ended, and the question with it
        assert await client.look(5.0) is None
        other = QueueChannel()
        client.reattach(other, QueueChannel(), tiny_capacity())
        assert await client.look(0.01) is None
        assert other.poll()
        await client.close()
        assert await client.look(5.0) is None

    run(main)


def test_looking_goes_on_while_ranks_are_lost_and_after_they_are_back() -> None:
    async def main() -> None:
        engine = Engine({4: RankDied("rank 1 died: killed", rank=1)})
        owner = Owner(engine)
        one = request("a", 6, 20)
        task = asyncio.create_task(deltas_of(owner.client, one))
        assert isinstance(await owner.fault(), Lost)
        seen = await owner.client.look(10.0)
        assert seen is not None and len(seen.slots) == 1
        owner.resume(1)
        assert [t for d in await task for t in d.token_ids] == expected_tokens(one, 20)
        seen = await owner.client.look(10.0)
        assert seen is not None and seen.slots == []
        await owner.client.close()

    run(main)


def test_no_snapshot_is_made_while_nobody_asks(monkeypatch) -> None:
    made: list[float] = []
    monkeypatch.setattr("tpqwen.engine.loop.snapshot", lambda scheduler: made.append(time.monotonic()))

    async def main() -> None:
        async with engine(FakeExecutor()) as client:
            await asyncio.gather(*(deltas_of(client, request(f"r{i}", 5, 20)) for i in range(10)))

    run(main)
    for thread in [t for t in threading.enumerate() if t.name == "engine"]:
        thread.join(30.0)
        assert not thread.is_alive()
    assert not made


def test_a_ranks_load_is_what_it_was_busy_between_two_readings() -> None:
    def stats(rank: int, busy_s: float, **gpu: float) -> RankStats:
        return RankStats(
            rank=rank, pid=1, host="h", device="cuda:0", busy_s_total=busy_s, memory_allocated_bytes=7, gpu=gpu
        )

    readings = Readings()
    assert readings.latest() == []
    readings.observe([stats(1, 3.0), stats(0, 5.0, memory_used_bytes=40.0, memory_total_bytes=80.0)], 2, now=10.0)
    assert readings.latest() == [
        RankLoad(0, True, "cuda:0", None, 5.0, 40, 80),
        RankLoad(1, True, "cuda:0", None, 3.0, 7, None),
    ]
    readings.observe([stats(0, 6.0, memory_used_bytes=0.0)], 2, now=12.0)
    assert readings.latest() == [RankLoad(0, True, "cuda:0", 0.5, 6.0, None, None), RankLoad(1, False)]
    readings.observe([stats(0, 9.0), stats(1, 0.5)], 2, now=13.0)  # more than could be; a new process
    assert [r.busy_ratio for r in readings.latest()] == [1.0, None]
