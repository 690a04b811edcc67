"""EngineClient over the engine's loop: every request ends exactly once, whatever engine, caller and ranks do."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest

from tests.fakes import FakeExecutor, expected_tokens, tiny_capacity
from tpqwen.config import ScheduleOptions
from tpqwen.engine import line
from tpqwen.engine.cadence import Cadence
from tpqwen.engine.client import EngineClient
from tpqwen.engine.core import EngineCore
from tpqwen.engine.local import start_local_engine
from tpqwen.engine.loop import EngineLoop
from tpqwen.engine.messages import Abort, Add, Batch, RanksLost, Several, decode_command, encode
from tpqwen.errors import EngineError, Overloaded, RankDied, RequestError
from tpqwen.request import Delta, Deltas, FinishReason, GenerateRequest, SamplingParams
from tpqwen.step import StepOutput, StepStats
from tpqwen.transport.channel import QueueChannel
from tpqwen.transport.ring import RingReader, RingWriter


def request(name: str, prompt: int = 6, max_tokens: int = 8, **changes: Any) -> GenerateRequest:
    seed = sum(name.encode())
    ids = [(seed + i) % 900 + 3 for i in range(prompt)]
    return GenerateRequest(
        id=name, prompt_ids=ids, params=SamplingParams(), max_tokens=max_tokens, seed=seed, **changes
    )


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 30))


@asynccontextmanager
async def engine(
    executor: FakeExecutor | None = None, stats: list[StepStats] | None = None, **options: int
) -> AsyncIterator[EngineClient]:
    executor = executor or FakeExecutor()
    schedule = ScheduleOptions(**options)
    core = EngineCore(executor, executor.start(), schedule)
    client = start_local_engine(core, schedule, None if stats is None else stats.append)
    try:
        yield client
    finally:
        await client.close()


async def deltas_of(client: EngineClient, one: GenerateRequest) -> list[Delta]:
    return [delta async for delta in client.generate(one)]


def tokens_of(deltas: list[Delta]) -> list[int]:
    """All tokens, checked: none lost, none doubled, exactly one end and it is the last."""
    tokens: list[int] = []
    for delta in deltas:
        assert not delta.token_ids or delta.index == len(tokens)
        tokens += delta.token_ids
    assert [d.finish_reason is not None for d in deltas] == [False] * (len(deltas) - 1) + [True]
    return tokens


class SlowExecutor(FakeExecutor):
    """Waits before each collect until told, so that a test decides when steps end."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.go = threading.Semaphore(0)

    def collect(self, timeout_s: float) -> StepOutput:
        assert self.go.acquire(timeout=20)
        return super().collect(timeout_s)


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        await asyncio.sleep(0.002)


def test_many_requests_at_once_each_get_their_own_tokens():
    async def main() -> None:
        stats: list[StepStats] = []
        async with engine(stats=stats) as client:
            requests = [request(f"r{i}", 3 + i % 17, 1 + i % 13) for i in range(60)]
            results = await asyncio.gather(*(deltas_of(client, r) for r in requests))
            for one, deltas in zip(requests, results, strict=True):
                assert tokens_of(deltas) == expected_tokens(one, one.max_tokens)
            assert client.num_open == 0
            assert client.state.name == "ready" and client.capacity == tiny_capacity()
            await until(lambda: bool(stats) and stats[-1].num_running == 0)
            assert sum(s.output_tokens for s in stats) == sum(r.max_tokens for r in requests)

    run(main)


def test_closing_the_iterator_frees_the_blocks_within_a_few_steps():
    async def main() -> None:
        executor = FakeExecutor()
        stats: list[StepStats] = []
        async with engine(executor, stats) as client:
            async with aclosing(client.generate(request("leaves", 8, 80))) as stream:
                async for _ in stream:
                    break
            seen = len(executor.steps)
            await deltas_of(client, request("next", 4, 3))
            await until(lambda: stats[-1].num_running == 0 and stats[-1].blocks_used == 0)
            assert client.num_open == 0
            assert len(executor.steps) < seen + 40

    run(main)


def test_a_request_that_leaves_before_it_starts_does_not_count_as_waiting():
    async def main() -> None:
        executor = SlowExecutor()
        async with engine(executor, max_waiting=1) as client:
            first = asyncio.create_task(deltas_of(client, request("first")))
            await until(lambda: client.num_open == 1)
            with pytest.raises(Overloaded) as caught:
                await deltas_of(client, request("second"))
            assert (caught.value.status, caught.value.code) == (429, "queue_full")
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
            assert client.num_open == 0
            executor.go.release(1000)
            one = request("third")
            assert tokens_of(await deltas_of(client, one)) == expected_tokens(one, 8)

    run(main)


def test_waiting_tokens_beyond_the_free_pages_are_limited():
    async def main() -> None:
        executor = SlowExecutor(capacity=tiny_capacity(num_blocks=12))  # 44 tokens
        async with engine(executor, max_waiting_tokens=10) as client:
            first = asyncio.create_task(deltas_of(client, request("long", 40)))
            await until(lambda: client.num_open == 1)
            with pytest.raises(Overloaded, match="40 tokens"):
                await deltas_of(client, request("second", 15))
            executor.go.release(1000)
            tokens_of(await first)
            tokens_of(await deltas_of(client, request("short", 2)))

    run(main)


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (RankDied("rank 1 died: killed", rank=1), "rank_dead"),
        (EngineError("rank 0 failed: out of memory", code="rank_dead"), "rank_dead"),
        (ZeroDivisionError("ours"), "internal"),
    ],
)
def test_when_the_ranks_fail_every_open_request_ends_once_with_the_cause(fault, code):
    async def main() -> None:
        executor = FakeExecutor(faults={5: fault})
        async with engine(executor) as client:
            results = await asyncio.gather(*(deltas_of(client, request(f"r{i}", 5, 60)) for i in range(12)))
            for deltas in results:
                tokens_of(deltas)
                assert deltas[-1].finish_reason is FinishReason.ERROR
                assert deltas[-1].error_code == code
                assert str(fault) in (deltas[-1].error or "")
            await until(lambda: client.state.name == "dead")
            assert str(fault) in client.state.reason
            with pytest.raises(EngineError, match=r"died|failed"):
                await deltas_of(client, request("late"))
            assert client.num_open == 0

    run(main)


def test_the_owner_of_the_ranks_may_report_a_death_while_the_engine_is_idle():
    async def main() -> None:
        async with engine() as client:
            client.send(RanksLost("rank 3 died: its node is gone", 3, 0))
            await until(lambda: client.state.name == "dead")
            assert "rank 3" in client.state.reason

    run(main)


def test_when_the_engine_process_dies_open_requests_end_and_new_ones_are_refused():
    async def main() -> None:
        client = EngineClient(QueueChannel(), reports := QueueChannel(), tiny_capacity(), ScheduleOptions())
        tasks = [asyncio.create_task(deltas_of(client, request(f"r{i}"))) for i in range(3)]
        await until(lambda: client.num_open == 3)
        reports.close()
        for deltas in await asyncio.gather(*tasks):
            assert [d.finish_reason for d in deltas] == [FinishReason.ERROR]
        client.fail("said again")
        assert "said again" not in client.state.reason
        with pytest.raises(EngineError):
            await deltas_of(client, request("late"))
        await client.close()

    run(main)


def test_a_line_that_breaks_while_requests_are_given_up_ends_each_of_them_once():
    async def main() -> None:
        client = EngineClient(commands := QueueChannel(), QueueChannel(), tiny_capacity(), ScheduleOptions())
        ends: list[str] = []
        end = client._end
        client._end = lambda opened, *cause: (ends.append(opened.request.id), end(opened, *cause))  # type: ignore[method-assign]
        tasks = [asyncio.create_task(deltas_of(client, request(f"r{i}"))) for i in range(3)]
        await until(lambda: client.num_open == 3)
        commands.close()
        client.give_up("it takes too long", "draining")
        found = await asyncio.gather(*tasks)
        assert [len(deltas) for deltas in found] == [1, 1, 1]
        assert found[0][0].error_code == "draining"
        assert sorted(ends) == ["r0", "r1", "r2"]
        await client.close()

    run(main)


def test_close_ends_what_is_open_and_the_engine_thread():
    async def main() -> None:
        executor = SlowExecutor()
        async with engine(executor) as client:
            task = asyncio.create_task(deltas_of(client, request("open")))
            await until(lambda: client.num_open == 1)
            await client.close()
            await client.close()
            assert [d.finish_reason for d in await task] == [FinishReason.ERROR]
            executor.go.release(1000)
        await until(lambda: not any(t.name in ("engine", "engine-reports") for t in threading.enumerate()))

    run(main)


def test_a_draining_engine_finishes_but_takes_nothing():
    async def main() -> None:
        executor = SlowExecutor()
        async with engine(executor) as client:
            one = request("running")
            task = asyncio.create_task(deltas_of(client, one))
            await until(lambda: client.num_open == 1)
            client.drain()
            assert client.state.name == "draining" and not client.state.accepts
            with pytest.raises(Overloaded) as caught:
                await deltas_of(client, request("late"))
            assert caught.value.status == 503
            executor.go.release(1000)
            assert tokens_of(await task) == expected_tokens(one, 8)
            client.reopen()
            assert client.state.name == "ready"
            another = request("another")
            assert tokens_of(await deltas_of(client, another)) == expected_tokens(another, 8)

    run(main)


def test_whoever_is_given_up_ends_once_with_the_cause_and_frees_its_blocks():
    async def main() -> None:
        executor, stats = SlowExecutor(), []
        async with engine(executor, stats) as client:
            tasks = [asyncio.create_task(deltas_of(client, request(name))) for name in ("one", "two")]
            executor.go.release(2)
            await until(lambda: bool(stats) and stats[-1].num_running == 2)
            client.give_up("the grace period is over", "draining")
            for deltas in await asyncio.gather(*tasks):
                tokens_of(deltas)
                assert (deltas[-1].finish_reason, deltas[-1].error_code) == (FinishReason.ERROR, "draining")
                assert deltas[-1].error == "the grace period is over"
            executor.go.release(1000)
            await until(lambda: stats[-1].blocks_used == 0)
            assert client.state.name == "ready"

    run(main)


def test_what_the_scheduler_refuses_is_raised_to_the_caller():
    async def main() -> None:
        async with engine() as client:
            with pytest.raises(RequestError):
                await deltas_of(client, request("too-long", 200))
            tokens_of(await deltas_of(client, request("good")))

    run(main)


def test_requests_that_come_together_reach_the_engine_together_eight_at_most(monkeypatch: pytest.MonkeyPatch):
    async def main() -> None:
        commands = QueueChannel()
        client = EngineClient(commands, QueueChannel(), tiny_capacity(), ScheduleOptions())
        tasks = [asyncio.create_task(deltas_of(client, request(f"r{i}"))) for i in range(line.TOGETHER + 3)]
        await until(lambda: client.num_open == len(tasks))
        await asyncio.sleep(0)
        messages = [decode_command(data) for data in iter(lambda: commands.recv(0.0) or b"", b"")]
        assert all(isinstance(m, Several) for m in messages)
        found = [m.commands for m in messages if isinstance(m, Several)]
        assert [len(c) for c in found] == [line.TOGETHER, 3]
        assert [*found[0], *found[1]] == [Add(request(f"r{i}")) for i in range(len(tasks))]
        tasks[1].cancel()
        await until(commands.poll)
        assert decode_command(commands.recv(0.0) or b"") == Abort("r1")  # alone: as it is
        monkeypatch.setattr(line, "TOGETHER_BYTES", 1)
        more = [asyncio.create_task(deltas_of(client, request(f"m{i}"))) for i in range(2)]
        await until(lambda: client.num_open == len(tasks) + 1)
        await asyncio.sleep(0)
        assert [decode_command(commands.recv(0.0) or b"") for _ in more] == [Add(request(f"m{i}")) for i in range(2)]
        await client.close()
        await asyncio.gather(*tasks, *more, return_exceptions=True)

    run(main)


def test_a_broken_channel_ends_what_was_sent_together():
    async def main() -> None:
        commands = QueueChannel()
        client = EngineClient(commands, QueueChannel(), tiny_capacity(), ScheduleOptions())
        commands.close()
        for deltas in await asyncio.gather(*(deltas_of(client, request(f"r{i}")) for i in range(3))):
            assert [d.error_code for d in deltas] == ["engine_dead"]
        assert client.state.name == "dead"
        await client.close()

    run(main)


@pytest.mark.parametrize("interval_s", [60.0, 0.001])
def test_under_load_tokens_after_the_first_wait_for_the_next_moment_of_writing_or_the_end(
    interval_s: float, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Cadence, "interval_s", lambda self, num_streams: interval_s)

    async def main() -> None:
        reports, taken = QueueChannel(), list[list[int]]()
        client = EngineClient(QueueChannel(), reports, tiny_capacity(), ScheduleOptions())

        async def read() -> None:
            async for delta in client.generate(request("a")):
                taken.append(delta.token_ids)

        def report(index: int, reason: FinishReason | None = None) -> None:
            delta = Delta(id="a", index=index, token_ids=[index], finish_reason=reason)
            reports.send(encode(Batch(Deltas(others=[delta]))), 1.0)

        task = asyncio.create_task(read())
        await until(lambda: client.num_open == 1)
        report(0)
        await until(lambda: taken == [[0]])
        for index in range(1, 4):
            report(index)
        if interval_s < 1:
            await until(lambda: sum(map(len, taken)) == 4)
        report(4, FinishReason.LENGTH)
        await task
        assert [token for tokens in taken for token in tokens] == [0, 1, 2, 3, 4]
        assert interval_s < 1 or taken == [[0], [1, 2, 3, 4]]
        await client.close()

    run(main)


def test_a_broken_channel_is_reported_once():
    async def main() -> None:
        faults: list[Any] = []
        commands = QueueChannel()
        client = EngineClient(commands, QueueChannel(), tiny_capacity(), ScheduleOptions(), on_fault=faults.append)
        commands.close()
        tasks = [asyncio.create_task(deltas_of(client, request(f"r{i}"))) for i in range(2 * line.TOGETHER + 1)]
        await until(lambda: client.num_open == len(tasks))
        await asyncio.sleep(0)
        client.drain()
        await asyncio.sleep(0)
        assert [f.code for f in faults] == ["engine_dead"]
        await client.close()
        assert [deltas[-1].error_code for deltas in await asyncio.gather(*tasks)] == ["shut_down"] * len(tasks)

    run(main)


def test_commands_wait_in_order_while_the_engine_is_too_busy_to_read_them(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(line, "TOGETHER_BYTES", 300)  # the ring is small too

    async def main() -> None:
        commands = RingWriter(1, capacity=600)
        inbox = RingReader(commands.address(0))
        reports = QueueChannel()
        client = EngineClient(commands, reports, tiny_capacity(), ScheduleOptions())
        tasks = [asyncio.create_task(deltas_of(client, request(f"r{i}"))) for i in range(20)]
        await until(lambda: client.num_open == 20)
        begin = time.monotonic()
        await asyncio.sleep(0)
        assert time.monotonic() - begin < 0.5  # the event loop is not held up
        executor = FakeExecutor()
        core = EngineCore(executor, executor.start())
        loop = EngineLoop(core, inbox, reports)
        thread = threading.Thread(target=loop.run, daemon=True)
        thread.start()
        for i, deltas in enumerate(await asyncio.gather(*tasks)):
            assert tokens_of(deltas) == expected_tokens(request(f"r{i}"), 8)
        await client.close()
        await asyncio.to_thread(thread.join, 10)
        assert not thread.is_alive()

    run(main)


def test_a_resubmitted_request_goes_on_after_its_tokens():
    async def main() -> None:
        commands = QueueChannel()
        client = EngineClient(commands, QueueChannel(), tiny_capacity(), ScheduleOptions())
        one = request("resumed", output_ids=[5, 6])
        task = asyncio.create_task(deltas_of(client, one))
        await until(lambda: client.num_open == 1 and commands.poll())
        data = commands.recv(1.0)
        assert data is not None
        assert decode_command(data) == Add(one)
        client.fail("gone", "rank_dead")
        deltas = await task
        assert (deltas[0].error, deltas[0].error_code, deltas[0].index) == ("gone", "rank_dead", 2)
        await client.close()

    run(main)
