"""The app over the real engine core with fake ranks, behind uvicorn on a real socket: for clients that misbehave."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import uvicorn

from tests.fakes import FakeExecutor
from tests.http.fake_engine import RecordingHooks
from tests.text_fixture import tokenizer
from tpqwen.api.access import Access
from tpqwen.api.app import build_app
from tpqwen.api.hooks import RequestHooks
from tpqwen.api.info import ApiSettings, ModelInfo
from tpqwen.config import ScheduleOptions
from tpqwen.engine.core import EngineCore
from tpqwen.engine.local import start_local_engine
from tpqwen.step import Capacity, StepOutput, StepStats
from tpqwen.text.chat import ChatFormat, GenerationDefaults
from tpqwen.text.sequences import Limits

MAX_MODEL_LEN = 40_000
SEND_BUFFER_BYTES = 16 * 1024


class TimedExecutor(FakeExecutor):
    """Every step takes step_s; the answer is always the letter a."""

    def __init__(self, capacity: Capacity, step_s: float) -> None:
        super().__init__(capacity, next_token=lambda history, params, index: tokenizer().encode("a")[0])
        self.step_s = step_s

    def collect(self, timeout_s: float) -> StepOutput:
        time.sleep(self.step_s)
        self.steps.clear()
        return super().collect(timeout_s)


@dataclass
class Live:
    """A server that runs in a thread of its own."""

    port: int
    hooks: RecordingHooks
    last: StepStats | None = None
    failures: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def until_idle(self) -> None:
        """Wait until nothing runs, nothing waits and every page is free or cached."""
        until(lambda: self.last is not None and not (self.last.num_running or self.last.blocks_used))

    def still_serves(self) -> None:
        """A good request is answered, and then nothing is held."""
        answer = httpx.post(f"{self.url}/v1/completions", json={"prompt": "hi", "max_tokens": 3}, timeout=20)
        assert answer.status_code == 200, answer.text
        self.until_idle()

    def connect(self, receive_buffer: int = 0) -> socket.socket:
        """A client's socket; a small receive buffer makes its server feel soon that nobody reads."""
        client = socket.socket()
        if receive_buffer:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.settimeout(20)
        client.connect(("127.0.0.1", self.port))
        return client


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "in vain"
        time.sleep(0.01)


def completion(*, close: bool = False, **body: Any) -> bytes:
    """A request for a completion, as bytes. close: the connection is to end with the answer."""
    data = json.dumps({"prompt": "hello", "ignore_eos": True, **body}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    return head.encode() + (b"\r\nConnection: close" if close else b"") + b"\r\n\r\n" + data


def received(client: socket.socket) -> bytes:
    """All until the server closes the connection."""
    data = b""
    while chunk := _recv(client):
        data += chunk
    return data


def _recv(client: socket.socket) -> bytes:
    try:
        return client.recv(65536)
    except ConnectionResetError:
        return b""


@contextmanager
def live(
    step_s: float = 0.001,
    access: Access | None = None,
    schedule: Any = None,
    hooks: RequestHooks | None = None,
    on_stats: Callable[[StepStats], None] = lambda stats: None,
    **settings: Any,
) -> Iterator[Live]:
    """A server on a free port; `settings` are those of the API, `schedule` options of the engine. hooks in the place of
    those that remember; on_stats hears of every step, on the server's thread."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
    here = Live(listener.getsockname()[1], RecordingHooks())
    ready, stop = threading.Event(), threading.Event()

    def note(stats: StepStats) -> None:
        here.last = stats
        on_stats(stats)

    async def serve() -> None:
        capacity = Capacity(
            num_blocks=8000, block_size=16, max_num_seqs=16, max_model_len=MAX_MODEL_LEN, max_batched_tokens=256
        )
        options = ScheduleOptions(**(schedule or {}))
        core = EngineCore(TimedExecutor(capacity, step_s), capacity, options)
        engine = start_local_engine(core, options, note)
        model = tokenizer()
        limits = Limits(MAX_MODEL_LEN, model.vocabulary.size, (model.encode("<|im_end|>")[0],))
        info = ModelInfo("qwen3-test", limits, created=1)
        chat = ChatFormat(model, GenerationDefaults())
        app = build_app(engine, chat, info, hooks or here.hooks, ApiSettings(**settings), access=access)
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off", access_log=False))
        running = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started:
            await asyncio.sleep(0.005)
        ready.set()
        await asyncio.to_thread(stop.wait)
        server.should_exit = server.force_exit = True
        await running
        await engine.close()

    def run() -> None:
        asyncio.run(serve())

    thread = threading.Thread(target=run, name="live server", daemon=True)
    thread.start()
    assert ready.wait(20)
    try:
        yield here
    finally:
        stop.set()
        thread.join(20)
        listener.close()
