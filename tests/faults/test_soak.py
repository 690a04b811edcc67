"""Minutes of mixed load, random kills, clients that leave and bad requests: all accounted for, and nothing grows.

TPQWEN_SOAK_S is how long (300 s by default; 2700 is the long form).
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import threading
import time
from collections import Counter
from contextlib import aclosing
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from tests.cluster.processes import children_of, title
from tests.faults.served import SIZES, Served, Stream
from tests.http.driver import CHAT, COMPLETIONS
from tests.http.fake_engine import RecordingHooks
from tpqwen.api.app import build_app
from tpqwen.api.info import ModelInfo
from tpqwen.errors import EngineError, RequestError
from tpqwen.executor import processes
from tpqwen.request import FinishReason, GenerateRequest
from tpqwen.text.chat import ChatFormat, GenerationDefaults
from tpqwen.text.sequences import Limits

SECONDS = float(os.environ.get("TPQWEN_SOAK_S", "300"))
CLIENTS = 8
KILL_EVERY_S = (8.0, 20.0)
BAD: list[tuple[str, bytes | dict[str, Any]]] = [  # whom they are sent to, and the body; each is answered with 400
    (COMPLETIONS, b""),
    (COMPLETIONS, b'{"prompt": "x", "max_tok'),
    (COMPLETIONS, b'{"prompt": "\xff\xfe"}'),
    (COMPLETIONS, b'{"prompt": "x", "temperature": NaN}'),
    (COMPLETIONS, b'{"prompt": "x", "prompt": "y"}'),
    (COMPLETIONS, b"[" * 10_000),
    (COMPLETIONS, {"prompt": "x", "max_tokens": 0.5}),
    (COMPLETIONS, {"prompt": "x", "temperature": -1}),
    (COMPLETIONS, {"prompt": [1, -1]}),
    (COMPLETIONS, {"prompt": "word " * 5000}),
    (COMPLETIONS, {"prompt": "x", "logit_bias": {"999999": 1}}),
    (COMPLETIONS, {"prompt": "x", "n": 10**9}),
    (COMPLETIONS, {"prompt": "x", "no_such_parameter": 1}),
    (CHAT, {"messages": "hi"}),
    (CHAT, {"messages": [{"role": "wizard", "content": "hi"}]}),
    (CHAT, {"messages": [{"role": "user", "content": "hi"}], "stop": ["a"] * 5}),
]
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(SECONDS + 300)]


def numbers(served: Served) -> dict[str, float]:
    """What must not grow: of this process (the replica's side), the engine and the ranks."""
    group = served.supervisor.group
    assert group is not None
    pids = {"replica": os.getpid(), "engine": served.supervisor.engine_pid}
    pids |= {f"rank {rank}": pid for rank, pid in enumerate(group.pids())}
    found: dict[str, float] = {"threads of replica": threading.active_count()}
    found["tasks of replica"] = len(asyncio.all_tasks())
    found["processes of ours"] = sum(title(pid).startswith("tpqwen") for pid in children_of({os.getpid()}))
    for name, pid in pids.items():
        found[f"files of {name}"] = len(os.listdir(f"/proc/{pid}/fd"))
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        found[f"MiB of {name}"] = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    return found


class Load:
    """Clients that ask, check and leave; and somebody who kills."""

    def __init__(self, served: Served, seed: int) -> None:
        self._served = served
        self._random = random.Random(seed)
        self._expected = served.expected()
        self.ends: Counter[str] = Counter()
        self.kills: Counter[str] = Counter()
        self.gaps: list[float] = []
        self._until = 0.0
        self._hooks = RecordingHooks()
        self._http = httpx.AsyncClient(transport=httpx.ASGITransport(app=self._app()), base_url="http://test")

    def _app(self) -> Any:
        """The HTTP side of a replica over this engine, without a socket."""
        tokenizer = self._served.tokenizer
        info = ModelInfo("tpqwen-demo", Limits(SIZES["max_model_len"], 4087, (4089,)), created=1)
        return build_app(self._served.client, ChatFormat(tokenizer, GenerationDefaults()), info, self._hooks)

    async def run(self, seconds: float) -> None:
        self._until = time.monotonic() + seconds
        await asyncio.gather(self._kill(), *(self._client(i) for i in range(CLIENTS)))
        await self._served.until_idle()

    async def _client(self, number: int) -> None:
        while time.monotonic() < self._until:
            try:
                await self._ask()
            except EngineError as error:  # a repair takes longer than anybody wants to queue; no stream had begun
                if (error.status, error.code) != (503, "rank_dead"):
                    raise
                self.ends["told to come back later"] += 1
                while not (state := self._served.client.state).accepts:
                    assert state.name == "degraded", state
                    await asyncio.sleep(0.1)

    async def _ask(self) -> None:
        kind = self._random.randrange(len(self._expected))
        request = self._served.requests()[kind]
        dice = self._random.random()
        if dice < 0.05:
            await self._leave(request)
        elif dice < 0.07:
            await self._ask_too_much(request)
        elif dice < 0.12:
            await self._ask_badly()
        else:
            self._check(kind, await self._served.stream(request))

    async def _leave(self, request: GenerateRequest) -> None:
        async with aclosing(self._served.client.generate(request)) as deltas:
            async for _ in deltas:
                break
        self.ends["left"] += 1

    async def _ask_too_much(self, request: GenerateRequest) -> None:
        with pytest.raises(RequestError):
            await self._served.stream(msgspec.structs.replace(request, prompt_ids=[5] * 600))
        self.ends["refused"] += 1

    async def _ask_badly(self) -> None:
        path, body = self._random.choice(BAD)
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        answer = await self._http.post(path, content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 400, (path, content[:80], answer.text)
        assert set(answer.json()) == {"error"}
        self._hooks.calls.clear()
        self.ends["bad, answered with 400"] += 1

    def _check(self, kind: int, seen: Stream) -> None:
        """Equal to the undisturbed run, or ended in words after three crashes."""
        if seen.finish_reason is FinishReason.ERROR:
            assert seen.error_code == "crash_budget", seen.error
            assert seen.tokens == self._expected[kind].tokens[: len(seen.tokens)]
            self.ends["crash budget"] += 1
            return
        seen.assert_equals(self._expected[kind])
        self.ends["resumed and equal" if seen.resumed else "equal"] += 1
        self.gaps.append(seen.longest_gap_s)

    async def _kill(self) -> None:
        while True:
            await asyncio.sleep(self._random.uniform(*KILL_EVERY_S))
            if time.monotonic() > self._until:
                return
            group = self._served.supervisor.group
            assert group is not None
            victims: dict[str, int] = {f"rank {rank}": pid for rank, pid in enumerate(group.pids())}
            victims["engine"] = self._served.supervisor.engine_pid
            name = self._random.choice(sorted(victims))
            how = self._random.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP])
            if victims[name] and not processes.is_gone(victims[name]):
                os.kill(victims[name], how)
                self.kills[f"{name} {how.name}"] += 1


def test_minutes_of_load_and_kills_lose_nothing_and_leave_nothing(served: Served, capsys: Any) -> None:
    load = Load(served, seed=4)
    served.run(load.run(20), timeout_s=120)  # what grows at first: pools, caches, a first repair
    begin = served.run(later(served))
    served.run(load.run(SECONDS), timeout_s=SECONDS + 120)
    end = served.run(later(served))
    with capsys.disabled():
        print(f"\nends {dict(load.ends)}\nkills {dict(load.kills)}, recoveries {len(served.hooks.recoveries)}")
        print(f"longest silence of a stream {max(load.gaps):.2f} s")
        for name in begin:
            print(f"{name}: {begin[name]:.0f} -> {end[name]:.0f}")
    assert load.ends["resumed and equal"] > 0
    for name in begin:
        allowed = 30 + SECONDS / 60 if name.startswith("MiB") else 3
        assert end[name] <= begin[name] + allowed, name


async def later(served: Served) -> dict[str, Any]:
    """The numbers once everything is quiet."""
    await served.until_idle()
    await asyncio.sleep(1.0)
    return numbers(served)
