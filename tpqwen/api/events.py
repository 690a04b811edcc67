"""GET /v1/engine/events: the engine as it is, once a second, for whoever looks on.

The engine is asked for all viewers together, and only while there are some. A stream ends by itself after a minute, so
that it never holds up a replica that Serve drains; a viewer then asks again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import msgspec

from tpqwen.api.exchange import Exchange
from tpqwen.api.info import ApiSettings
from tpqwen.api.stream import EventStream
from tpqwen.engine.protocol import Engine, EngineState, Work
from tpqwen.errors import Overloaded
from tpqwen.readings import RankLoad
from tpqwen.step import Snapshot

MAX_VIEWERS = 32
KIND = "text/event-stream; charset=utf-8"


class EngineEvents:
    """The viewers of one replica and what they are shown. Belongs to one event loop."""

    def __init__(self, engine: Engine, ranks: Callable[[], list[RankLoad]], settings: ApiSettings) -> None:
        self._engine = engine
        self._ranks = ranks
        self._settings = settings
        self._next: asyncio.Task[bytes] | None = None  # the event that all viewers wait for
        self._due = 0.0  # when it is to be made
        self._before: tuple[float, Work] | None = None  # the last one: when, and all work until then
        self._viewers = 0

    async def show(self, exchange: Exchange) -> None:
        """Answer one viewer until it leaves. Raises Overloaded when too many look on already."""
        if exchange.method == "HEAD":
            await exchange.reply(b"", kind=KIND)
            return
        if self._viewers >= MAX_VIEWERS:
            raise Overloaded(f"{self._viewers} streams of engine events are open already", code="concurrency")
        self._viewers += 1
        try:
            await exchange.until_client_leaves(self._stream(exchange))
        finally:
            self._viewers -= 1
            if not self._viewers and self._next is not None:
                self._next.cancel()
                self._next = self._before = None

    async def _stream(self, exchange: Exchange) -> None:
        stream = EventStream(exchange.send, self._settings, lambda: "", exchange.give_up)
        end = time.monotonic() + self._settings.events_for_s
        async with stream:
            last = False
            while not last:
                event = await self._event()
                last = time.monotonic() >= end or _is_over(self._engine.state)
                await stream.write(event, last=last)

    async def _event(self) -> bytes:
        """The next event, the same for all who wait for it."""
        if self._next is None or self._next.done():
            self._next = asyncio.create_task(self._make())
        return await asyncio.shield(self._next)

    async def _make(self) -> bytes:
        every = self._settings.events_every_s
        await asyncio.sleep(max(0.0, self._due - time.monotonic()))
        self._due = time.monotonic() + every
        snapshot = await self._engine.look(every)
        now, work = time.monotonic(), self._engine.work
        then, before = self._before or (now, work)
        self._before = now, work
        done = work.since(before)
        steps = {
            "count": done.steps,
            "mean_ms": round(done.seconds / done.steps * 1e3, 3) if done.steps else None,
            "output_tokens": done.tokens,
            "seconds": round(now - then, 3),
        }
        value = {"time": round(time.time(), 3), **_described(self._engine.state, snapshot)}
        return b"data: " + msgspec.json.encode(value | {"steps": steps, "ranks": self._ranks()}) + b"\n\n"


def _is_over(state: EngineState) -> bool:
    return state.name in ("draining", "dead")


def _described(state: EngineState, snapshot: Snapshot | None) -> dict[str, Any]:
    """What the scheduler holds; null while the engine does not answer."""
    out: dict[str, Any] = {"state": state.name, "reason": state.reason, "slots": None, "blocks": None, "queue": None}
    if snapshot is not None:
        running = [
            {"slot": s.slot, "phase": s.phase, "tokens": s.num_tokens, "computed": s.num_computed}
            for s in snapshot.slots
        ]
        used, cached, free = snapshot.blocks_used, snapshot.blocks_cached, snapshot.blocks_free
        out["slots"] = {"total": snapshot.num_slots, "running": running}
        out["blocks"] = {"used": used, "cached": cached, "free": free}
        out["queue"] = {"requests": snapshot.num_waiting, "tokens": snapshot.waiting_tokens}
    return out
