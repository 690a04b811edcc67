"""Compiling in a process of its own: limits that kill, what is remembered, and life after a lost process."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.text_fixture import write_tokenizer
from tpqwen import structure as s
from tpqwen.compiler import CompileLimits, GrammarService
from tpqwen.errors import EngineError, Overloaded, RequestError
from tpqwen.grammar import Vocabulary

SIZE = 448
GOOD = s.Regex("[ab]{1,3}")
SLOW = s.Regex("(x+x+)+y" * 2000)  # minutes
LARGE = s.Schema('{"type": "string", "pattern": "^[\\\\s\\\\S]{0,3000000}$"}')  # gigabytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def run(folder: Path, work: Callable[[GrammarService], Awaitable[Any]], **limits: Any) -> Any:
    async def inner() -> Any:
        service = GrammarService(folder, SIZE, CompileLimits(**{"timeout_s": 30.0, **limits}))
        try:
            async with asyncio.timeout(120):
                return await work(service)
        finally:
            await service.close()

    return asyncio.run(inner())


def test_grammars_are_compiled_remembered_and_followed(folder: Path) -> None:
    async def work(service: GrammarService) -> tuple[bytes, bytes]:
        await service.start()
        first, twin = await asyncio.gather(service.compile(GOOD, "p"), service.compile(GOOD, "p"))
        assert first is twin
        assert service._process is not None
        os.kill(service._process.pid, signal.SIGKILL)
        again = await service.compile(GOOD, "p")  # from memory
        await service._process.wait()
        other = await service.compile(s.Literal("x"), "p")  # by a new process
        with pytest.raises(RequestError) as caught:
            await service.compile(s.Regex("("), "structured_outputs.regex")
        assert (caught.value.status, caught.value.param) == (400, "structured_outputs.regex")
        return again, other

    again, other = run(folder, work)
    vocabulary = Vocabulary(folder, SIZE)
    assert vocabulary.compile(GOOD) == again
    for compiled in (again, other):
        assert vocabulary.matcher(compiled, (1,))


def test_too_much_time_or_memory_is_a_refusal_and_the_next_one_works(folder: Path) -> None:
    async def work(service: GrammarService) -> None:
        await service.start()
        process = service._process
        for structure, limits, what in (
            (SLOW, CompileLimits(timeout_s=0.5), "more than 0.5 s"),
            (LARGE, CompileLimits(timeout_s=30.0, memory_bytes=64 << 20), "too much memory"),
        ):
            service.limits = limits
            with pytest.raises(RequestError, match=what) as caught:
                await service.compile(structure, "p")
            assert caught.value.status == 400
        service.limits = CompileLimits(timeout_s=30.0)
        assert await service.compile(GOOD, "p")
        assert service._process is process, "one bad grammar must not cost the process"

    run(folder, work)


def test_waiting_and_memory_are_bounded_and_leaving_harms_nobody(folder: Path) -> None:
    async def work(service: GrammarService) -> None:
        tasks = [asyncio.create_task(service.compile(s.Literal(f"x{i}"), "p")) for i in range(4)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await service.compile(s.Literal("y"), "p")
        twin = asyncio.create_task(service.compile(s.Literal("x3"), "p"))
        await asyncio.sleep(0)
        tasks[3].cancel()
        assert await twin
        assert len([await t for t in tasks[:3]]) == 3
        assert service._known_bytes == sum(map(len, service._known.values()))
        assert len(service._known) == 1

    run(folder, work, max_waiting=4, cache_bytes=1)


def test_a_process_that_cannot_start_is_our_failure(tmp_path: Path) -> None:
    async def work(service: GrammarService) -> None:
        await service.start()
        with pytest.raises(EngineError, match="does not start"):
            await service.compile(GOOD, "p")

    run(tmp_path, work)
