"""GET /v1/engine/events: what it shows, to whom, for how long, and what it costs the engine."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from tests.http.driver import Connection, events, exchange
from tests.http.fake_engine import Server, make_server
from tests.http.live import live, until
from tests.http.test_access import bearer, closed
from tests.http.test_errors import check_error
from tpqwen.api import events as events_module
from tpqwen.engine.protocol import EngineState, Work
from tpqwen.readings import RankLoad
from tpqwen.step import SlotView, Snapshot

EVENTS = "/v1/engine/events"
SEEN = Snapshot(8, [SlotView(2, "decode", 21, 20), SlotView(3, "prefill", 90, 64)], 7, 20, 36, 3, 120)


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 20))


def viewer(server: Server, headers: dict[str, str] | None = None) -> Connection:
    return Connection(server.app, EVENTS, {}, headers or {}, method="GET")


async def shown(one: Connection, count: int) -> list[Any]:
    """Wait for so many events; all that came."""
    while len(one.events) < count:
        await one.changed()
    return one.events


def test_an_event_has_slots_blocks_queue_steps_and_ranks() -> None:
    load = RankLoad(0, True, "cuda:0", 0.5, 12.5, 40, 80)
    server = make_server(ranks=lambda: [load, RankLoad(1, False)], events_every_s=0.01)
    server.engine.snapshot = SEEN

    async def main() -> None:
        one = viewer(server)
        running = asyncio.create_task(one.run())
        (first,) = (await shown(one, 1))[:1]
        assert (first["state"], first["reason"]) == ("ready", "")
        assert first["slots"]["total"] == 8
        assert first["slots"]["running"] == [
            {"slot": 2, "phase": "decode", "tokens": 21, "computed": 20},
            {"slot": 3, "phase": "prefill", "tokens": 90, "computed": 64},
        ]
        assert first["blocks"] == {"used": 7, "cached": 20, "free": 36}
        assert first["queue"] == {"requests": 3, "tokens": 120}
        assert first["steps"] == {"count": 0, "mean_ms": None, "output_tokens": 0, "seconds": 0.0}
        assert first["ranks"][0] == {
            "rank": 0,
            "up": True,
            "device": "cuda:0",
            "busy_ratio": 0.5,
            "busy_seconds_total": 12.5,
            "memory_bytes": 40,
            "memory_total_bytes": 80,
        }
        assert (first["ranks"][1]["up"], first["ranks"][1]["busy_ratio"]) == (False, None)
        server.engine.work = Work(4, 0.01, 9)
        await asyncio.sleep(0)
        while not any(e["steps"]["count"] for e in one.events):
            await one.changed()
        (worked,) = [e["steps"] for e in one.events if e["steps"]["count"]]
        assert (worked["count"], worked["mean_ms"], worked["output_tokens"]) == (4, 2.5, 9)
        assert worked["seconds"] > 0
        one.leave()
        await running

    run(main)


def test_viewers_share_one_snapshot_and_when_they_have_left_nothing_is_asked() -> None:
    server = make_server(events_every_s=0.02)

    async def main() -> None:
        before = asyncio.all_tasks()
        viewers = [viewer(server) for _ in range(5)]
        running = [asyncio.create_task(v.run()) for v in viewers]
        for v in viewers:
            await shown(v, 5)
        assert server.engine.looks <= max(len(v.events) for v in viewers) + 1
        assert viewers[0].events[:5] == viewers[4].events[:5]
        for v in viewers[1:]:
            v.leave()
        await asyncio.gather(*running[1:])
        await shown(viewers[0], len(viewers[0].events) + 2)
        viewers[0].leave()
        await running[0]
        looks = server.engine.looks
        await asyncio.sleep(0.1)
        assert server.engine.looks == looks
        assert asyncio.all_tasks() == before
        late = viewer(server)
        running = [asyncio.create_task(late.run())]
        await shown(late, 1)
        late.leave()
        await running[0]

    run(main)


def test_it_goes_on_while_the_engine_is_being_replaced_and_says_so() -> None:
    server = make_server(events_every_s=0.01)
    server.engine.snapshot = SEEN

    async def main() -> None:
        one = viewer(server)
        running = asyncio.create_task(one.run())
        await shown(one, 1)
        server.engine.snapshot, server.engine.current = None, EngineState("degraded", "the engine restarting: killed")
        await one.until("degraded")
        assert one.events[-1]["slots"] is None and one.events[-1]["blocks"] is None
        server.engine.snapshot, server.engine.current = SEEN, EngineState("ready")
        count = len(one.events)
        await shown(one, count + 2)
        assert one.events[-1]["slots"]["total"] == 8
        one.leave()
        await running

    run(main)


@pytest.mark.parametrize("state", ["draining", "dead"])
def test_it_ends_with_the_engine(state: str) -> None:
    server = make_server(events_every_s=0.01)
    server.engine.current = EngineState(state, "why")
    answer = exchange(server.app, "GET", EVENTS)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert [e["state"] for e in events(answer.text)] == [state]


def test_it_ends_by_itself_so_that_no_drain_waits_for_it() -> None:
    answer = exchange(make_server(events_every_s=0.01, events_for_s=0.05).app, "GET", EVENTS)
    assert 2 <= len(events(answer.text)) <= 7
    assert exchange(make_server().app, "HEAD", EVENTS).content == b""


def test_there_is_room_for_so_many_viewers_and_it_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events_module, "MAX_VIEWERS", 1)
    server = make_server(events_every_s=0.01)

    async def main() -> None:
        for _ in range(2):
            first = viewer(server)
            running = asyncio.create_task(first.run())
            await shown(first, 1)
            second = viewer(server)
            await second.run()
            assert second.status == 429 and b"concurrency" in second.sent[0]
            first.leave()
            await running

    run(main)


def test_it_needs_a_key_where_there_are_keys_and_counts_against_no_limit() -> None:
    check_error(exchange(closed().app, "GET", EVENTS), 401, "missing_api_key")
    server = closed("concurrency=1 requests_per_minute=1")

    async def main() -> None:
        for _ in range(2):
            one = viewer(server, bearer())
            running = asyncio.create_task(one.run())
            await shown(one, 1)
            one.leave()
            await running

    run(main)


def test_a_viewer_that_reads_nothing_is_let_go() -> None:
    server = make_server(events_every_s=0.01, comment_every_s=0.02, drop_client_after_s=0.05)

    async def main() -> None:
        one = viewer(server)
        running = asyncio.create_task(one.run())
        await shown(one, 1)
        one.stuck = True
        await running

    run(main)
    assert server.hooks.named("http") == [(EVENTS, "GET", 200)]  # leaving is how such a stream ends


def test_a_running_request_is_seen_at_its_slot_through_the_real_engine() -> None:
    with live(step_s=0.01, events_every_s=0.02) as server, httpx.Client(base_url=server.url, timeout=20) as client:
        body = {"prompt": "hello", "max_tokens": 100, "ignore_eos": True, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            with client.stream("GET", EVENTS) as stream:
                for line in stream.iter_lines():
                    event = events(line)[0] if line else {}
                    decoding = event and any(slot["computed"] > 5 for slot in event["slots"]["running"])
                    if decoding and event["steps"]["count"]:
                        break  # the prompt has five tokens, so this is behind the first step of decode
            (slot,) = event["slots"]["running"]
            assert slot["phase"] == "decode" and slot["tokens"] > slot["computed"]
            assert event["blocks"]["used"] > 0 and event["blocks"]["free"] > 0
            assert event["steps"]["mean_ms"] > 5
            assert sum(1 for line in lines if line) > 50
        server.until_idle()
        until(lambda: any(call[:2] == (EVENTS, "GET") for call in server.hooks.named("http")))
