"""The metrics of all replicas: each leaves its own where another one is there to show them, and only there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from tpqwen import board
from tpqwen.board import MetricsBoard
from tpqwen.ledger import Pages


class Replica:
    """One replica with a board over the shared pages, counting how often its text is written."""

    def __init__(self, name: str) -> None:
        self.written = 0
        self.name = name
        self.board = MetricsBoard(name, "app", self.text)

    def text(self) -> str:
        self.written += 1
        return f'# HELP x y\n# TYPE x gauge\nx{{replica="{self.name}"}} 1.0\n'

    @asynccontextmanager
    async def kept(self) -> AsyncIterator[Replica]:
        task = asyncio.create_task(self.board.keep())
        yield self
        task.cancel()


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Pages in this process instead of an actor, quick rounds; who exchanged pages so far."""
    pages, seen = Pages(), []

    class Shared:
        def __init__(self, name: str, replica: str, app: str) -> None:
            self.replica = replica

        async def exchange(self, page: str) -> dict[str, str]:
            seen.append(self.replica)
            return pages.exchange(self.replica, page)

    monkeypatch.setattr(board, "SharedPages", Shared)
    monkeypatch.setattr(board, "ROUND_S", 0.001)
    return seen


async def several(rounds: list[str], count: int = 12) -> None:
    end = len(rounds) + count
    while len(rounds) < end:
        await asyncio.sleep(0.001)


def test_a_replica_that_is_alone_writes_its_metrics_for_scrapers_only(rounds: list[str]) -> None:
    async def main() -> None:
        async with Replica("a").kept() as a:
            await several(rounds)
            assert a.written == 0
            assert 'x{replica="a"} 1.0' in await a.board.everyone()
            assert a.written == 1

    asyncio.run(asyncio.wait_for(main(), 10))


def test_each_of_several_shows_all(rounds: list[str]) -> None:
    async def main() -> None:
        a, b = Replica("a"), Replica("b")
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(a.kept())
            await several(rounds)
            await stack.enter_async_context(b.kept())
            await several(rounds)
            for replica in (a, b):
                shown = await replica.board.everyone()
                assert shown.count("# HELP x") == 1
                assert 'x{replica="a"} 1.0' in shown and 'x{replica="b"} 1.0' in shown

    asyncio.run(asyncio.wait_for(main(), 10))
