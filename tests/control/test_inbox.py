"""What waits for a reader: nothing lost, nothing late at the end, writes in intervals under load only."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tpqwen.engine.cadence import LONGEST_S, WRITES_PER_S, Cadence
from tpqwen.engine.inbox import Inbox
from tpqwen.request import Delta, FinishReason, TokenLogprob


def delta(index: int, *tokens: int, **changes: Any) -> Delta:
    return Delta(id="r", index=index, token_ids=list(tokens), **changes)


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 10))


def score(value: float) -> TokenLogprob:
    return TokenLogprob(value, [], [])


def test_a_late_reader_gets_all_at_once_with_what_first_and_last_delta_say() -> None:
    async def main() -> None:
        box = Inbox()
        box.put_nowait(delta(0, 1, cached_tokens=3, queue_s=0.5, logprobs=[score(-1)]))
        box.put_nowait(delta(1, 2, logprobs=[score(-2)]))
        box.put_nowait(delta(2, 3, 4, finish_reason=FinishReason.STOP, stop_id=4, resumed=1))
        assert box.unread == 4
        got = await box.get()
        assert (got.index, got.token_ids, got.cached_tokens, got.queue_s) == (0, [1, 2, 3, 4], 3, 0.5)
        assert (got.finish_reason, got.stop_id, got.resumed) == (FinishReason.STOP, 4, 1)
        assert got.logprobs == [score(-1), score(-2), None, None]
        assert box.unread == 0

    run(main)


def test_scores_stay_with_their_tokens_when_closing_tokens_that_nobody_scored_come_between() -> None:
    async def main() -> None:
        box = Inbox()
        box.put_nowait(delta(0, 1, logprobs=[score(-1)]))
        box.put_nowait(delta(1, 2, 3))  # as at the end of a thinking budget: in the same report as the token before
        box.put_nowait(delta(3, 4, logprobs=[score(-4)]))
        got = await box.get()
        assert got.token_ids == [1, 2, 3, 4]
        assert got.logprobs == [score(-1), None, None, score(-4)]
        box.put_nowait(delta(4, 5))
        box.put_nowait(delta(5, 6, logprobs=[score(-6)]))
        assert (await box.get()).logprobs == [None, score(-6)]
        box.put_nowait(delta(6, 7))
        box.put_nowait(delta(7, 8))
        assert (await box.get()).logprobs is None

    run(main)


def test_a_reader_that_waits_gets_each_delta_when_it_comes() -> None:
    async def main() -> None:
        box = Inbox()
        for i in range(3):
            reader = asyncio.create_task(box.get())
            await asyncio.sleep(0)
            box.put_nowait(delta(i, i))
            assert (await reader).token_ids == [i]

    run(main)


def test_what_is_held_waits_for_its_release_or_for_the_end() -> None:
    async def main() -> None:
        box = Inbox()
        reader = asyncio.create_task(box.get())
        for i in range(3):
            box.put_nowait(delta(i, i), hold=True)
            await asyncio.sleep(0)
            assert not reader.done()
        box.release()
        assert (await reader).token_ids == [0, 1, 2]
        box.release()  # nothing has come since
        late = asyncio.create_task(box.get())
        await asyncio.sleep(0)
        box.put_nowait(delta(3, 3), hold=True)
        box.put_nowait(delta(4, 4, finish_reason=FinishReason.LENGTH), hold=True)
        assert (await late).token_ids == [3, 4]

    run(main)


def test_what_need_not_be_held_any_more_brings_along_what_was() -> None:
    async def main() -> None:
        box = Inbox()
        box.put_nowait(delta(0, 0), hold=True)
        box.put_nowait(delta(1, 1))
        assert (await box.get()).token_ids == [0, 1]

    run(main)


def test_tokens_go_out_before_the_failure_that_ended_them() -> None:
    async def main() -> None:
        box = Inbox()
        box.put_nowait(delta(0, 1))
        box.put_nowait(delta(1, finish_reason=FinishReason.ERROR, error="rank 1 died", error_code="rank_dead"))
        assert (await box.get()).token_ids == [1]
        assert (await box.get()).error == "rank 1 died"
        refused = Inbox()
        refused.put_nowait(ValueError("no"))
        with pytest.raises(ValueError, match="no"):
            await refused.get()

    run(main)


def test_a_cancelled_reader_loses_nothing() -> None:
    async def main() -> None:
        box = Inbox()
        reader = asyncio.create_task(box.get())
        await asyncio.sleep(0)
        box.put_nowait(delta(0, 1))
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        assert (await box.get()).token_ids == [1]

    run(main)


def test_streams_are_paced_under_load_only_and_never_beyond_the_longest_interval() -> None:
    cadence, now = Cadence(), 0.0

    def steps(num_streams: int, step_s: float, seconds: float) -> float:
        nonlocal now
        for _ in range(round(seconds / step_s)):
            now += step_s
            cadence.observe(num_streams, now)
        return cadence.interval_s(num_streams)

    assert cadence.interval_s(256) == 0
    assert steps(1, 0.001, 1.0) == 0
    assert steps(256, 0.0125, 1.0) == pytest.approx(LONGEST_S)  # 20k tokens/s
    assert steps(64, 0.003, 1.0) == pytest.approx(64 / WRITES_PER_S)
    assert steps(8, 0.01, 1.0) == 0
    steps(256, 0.0125, 1.0)
    now += 10.0  # an idle server has no load, whatever its last window had
    cadence.observe(1, now)
    assert cadence.interval_s(1) == 0
