"""Twenty prompts of 4 MB at once: the event loop goes on. Run by hand; figures are in docs/LOG.md."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.http.fake_engine import make_server
from tests.http.serving import serving
from tests.text_fixture import write_tokenizer
from tpqwen.text.processes import TextProcesses

CLIENT = Path(__file__).with_name("long_client.py")
EVERY_S = 0.005


class Sampled:
    """An app whose event loop is watched: how much later than asked each sleep ends, seconds."""

    def __init__(self, app: Any) -> None:
        self.late: list[float] = []
        self._app = app
        self._watcher: asyncio.Task[None] | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if self._watcher is None:
            self._watcher = asyncio.create_task(self._watch())
        await self._app(scope, receive, send)

    async def _watch(self) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            began = clock()
            await asyncio.sleep(EVERY_S)
            self.late.append(clock() - began - EVERY_S)


@pytest.fixture
def text(tmp_path: Path) -> Iterator[TextProcesses]:
    service = TextProcesses(write_tokenizer(tmp_path), 512)
    service.start()
    yield service
    service.close()


def at(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["chat", "text", "ids", "escapes"])
def test_the_loop_goes_on_under_twenty_prompts_of_4_mb(text: TextProcesses, kind: str) -> None:
    app = Sampled(make_server(text_service=text).app)
    with serving(app) as url:
        done = subprocess.run([sys.executable, str(CLIENT), url, kind], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["statuses"] == [400] * 20
    lag, health = at(app.late, 0.99), at(found["health"], 0.99)
    print(f"{kind}: {len(app.late)} samples, loop lag p50 {at(app.late, 0.5) * 1e3:.1f} ms, p99 {lag * 1e3:.1f} ms,",
          f"most {max(app.late) * 1e3:.0f} ms; health p99 {health * 1e3:.0f} ms")  # fmt: skip
    assert lag < 0.05
    assert health < 0.1
