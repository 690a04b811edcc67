"""More than can be served, through the whole app over the real engine: slots stay full and nobody starves."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.fakes import FakeExecutor
from tests.http.driver import COMPLETIONS, Connection
from tests.http.fake_engine import RecordingHooks
from tests.text_fixture import tokenizer
from tpqwen.api.access import Access
from tpqwen.api.app import build_app
from tpqwen.api.info import ModelInfo
from tpqwen.api.keys import Keyring
from tpqwen.config import ScheduleOptions
from tpqwen.engine.client import EngineClient
from tpqwen.engine.core import EngineCore
from tpqwen.engine.local import start_local_engine
from tpqwen.step import Capacity, StepOutput, StepStats
from tpqwen.text.chat import ChatFormat, GenerationDefaults
from tpqwen.text.sequences import Limits

SLOTS = 8
QUEUE = 16
TOKENS = 12
CAPACITY = Capacity(num_blocks=400, block_size=4, max_num_seqs=SLOTS, max_model_len=96, max_batched_tokens=64)
NOISY, QUIET = "tpq_noisy_0123456789abcdef", "tpq_quiet_0123456789abcdef"


class SlowExecutor(FakeExecutor):
    """A step takes a while, so that requests meet."""

    def collect(self, timeout_s: float) -> StepOutput:
        time.sleep(0.002)
        return super().collect(timeout_s)


@dataclass
class Site:
    """The app, its engine and what was seen of it."""

    app: Any
    engine: EngineClient
    stats: list[StepStats] = field(default_factory=list)

    async def ask(self, key: str = NOISY, prompt: int = 5) -> Connection:
        """One request to its end."""
        body = {"prompt": [7] * prompt, "max_tokens": TOKENS, "ignore_eos": True, "stream": True}
        connection = Connection(self.app, COMPLETIONS, body, {"authorization": f"Bearer {key}"})
        await connection.run()
        return connection


@asynccontextmanager
async def site(keys: str = "", **schedule: Any) -> AsyncIterator[Site]:
    executor = SlowExecutor(CAPACITY, next_token=lambda history, params, index: 50)
    options = ScheduleOptions(**{"max_waiting": QUEUE, **schedule})
    stats: list[StepStats] = []
    engine = start_local_engine(EngineCore(executor, CAPACITY, options), options, stats.append)
    model = tokenizer()
    info = ModelInfo("m", Limits(96, model.vocabulary.size, ()), created=1)
    access = Access(Keyring.parse(keys)) if keys else None
    app = build_app(engine, ChatFormat(model, GenerationDefaults()), info, RecordingHooks(), access=access)
    try:
        yield Site(app, engine, stats)
    finally:
        await engine.close()


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))


def test_far_more_than_can_be_served_keeps_all_slots_full_and_is_refused_politely() -> None:
    async def main() -> None:
        async with site() as here:
            done: list[Connection] = []

            async def client() -> None:
                for _ in range(6):
                    done.append(await here.ask())
                    if done[-1].status == 429:
                        await asyncio.sleep(0.005)

            await asyncio.gather(*(client() for _ in range(60)))
            codes = Counter(connection.status for connection in done)
            assert set(codes) == {200, 429} and codes[200] > 60
            for connection in done:
                if connection.status == 200:
                    assert connection.events[-1] == "[DONE]"
                else:
                    assert json.loads(connection.sent[0])["error"]["code"] == "queue_full"
            full = [s for s in here.stats if s.num_waiting >= SLOTS]
            assert len(full) > 20
            assert max(s.num_waiting for s in here.stats) <= QUEUE
            busy = sum(s.num_running for s in full) / len(full)
            assert busy > 0.95 * (SLOTS - 1)  # a slot that became free is filled with the next step
            assert here.engine.num_open == 0 and here.stats[-1].blocks_used == 0

    run(main)


def test_a_full_queue_refuses_before_the_body_is_read() -> None:
    async def main() -> None:
        async with site(max_waiting=1) as here:
            over = asyncio.Event()

            async def client() -> None:
                while not over.is_set():
                    await here.ask()
                    await asyncio.sleep(0.001)

            crowd = [asyncio.create_task(client()) for _ in range(3 * SLOTS)]
            late = await here.ask()
            while late.status != 429 or late.body_read:  # between two looks at the queue it may have had room
                late = await here.ask()
            over.set()
            assert json.loads(late.sent[0])["error"]["code"] == "queue_full"
            await asyncio.gather(*crowd)

    run(main)


def test_a_quiet_key_is_never_refused_and_waits_for_its_turn_only() -> None:
    async def main() -> None:
        keys = f"noisy {NOISY}\nquiet {QUIET}"
        async with site(keys, max_waiting=4 * QUEUE) as here:
            codes: Counter[int | None] = Counter()
            over = asyncio.Event()

            async def noisy() -> None:
                while not over.is_set():
                    codes[(await here.ask(NOISY)).status] += 1
                    await asyncio.sleep(0.002)

            crowd = [asyncio.create_task(noisy()) for _ in range(80)]
            while codes[429] < 20:
                await asyncio.sleep(0.005)
            waits = []
            for _ in range(8):
                begun = len(here.stats)
                connection = await here.ask(QUIET)
                assert connection.status == 200
                waits.append(len(here.stats) - begun - TOKENS)
            over.set()
            await asyncio.gather(*crowd)
            # noisy's queue is 2 * QUEUE requests of TOKENS steps in SLOTS slots: four whole rounds to wait behind it.
            # The least of all waits counts: others may hold that the event loop was busy with the crowd.
            assert min(waits) < 2 * TOKENS
            assert codes[200] > 0

    run(main)
