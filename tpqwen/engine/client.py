"""The engine as the event loop sees it: requests go out as commands, each step's deltas come back as one message."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from tpqwen.config import ScheduleOptions
from tpqwen.engine.cadence import Cadence
from tpqwen.engine.gate import Gate, Place
from tpqwen.engine.inbox import Inbox
from tpqwen.engine.messages import Abort, Add, Batch, Command, Dead, Refused, Report, Stop, decode_report, encode
from tpqwen.engine.protocol import EngineState
from tpqwen.errors import EngineError, Overloaded, RequestError
from tpqwen.request import Delta, FinishReason, GenerateRequest
from tpqwen.step import Capacity, StepStats
from tpqwen.transport.channel import Receiver, Sender

MAX_UNREAD = 4096  # tokens; a client that is so far behind will not catch up
POLL_S = 0.5
RETRY_S = 0.005  # while the engine is too busy to read its commands

_log = logging.getLogger(__name__)


@dataclass
class OpenRequest:
    """One request on its way; its place in the queue is given up with its first delta."""

    request: GenerateRequest
    place: Place
    queue: Inbox = field(default_factory=Inbox)
    received: int = 0  # output tokens, those it brought along included


class EngineClient:
    """Implements engine.protocol.Engine over a pair of channels. All methods belong to one event loop and none waits.

    Every open request gets exactly one end, also when the engine dies: an error delta, or the exception that refused
    it.
    """

    def __init__(
        self,
        commands: Sender,
        reports: Receiver,
        capacity: Capacity,
        options: ScheduleOptions,
        on_stats: Callable[[StepStats], None] | None = None,
        *,
        queue_timeout_s: float = 0.0,
    ) -> None:
        self._commands = commands
        self._reports = reports
        self._capacity = capacity
        self._on_stats = on_stats
        self._state = EngineState("ready")
        self._open: dict[str, OpenRequest] = {}
        self._gate = Gate(options, capacity, queue_timeout_s)
        self._cadence = Cadence()
        self._unsent: deque[bytes] = deque()
        self._loop = asyncio.get_running_loop()
        self._closed = False
        self._thread = threading.Thread(target=self._read, name="engine-reports", daemon=True)
        self._thread.start()

    @property
    def capacity(self) -> Capacity:
        return self._capacity

    @property
    def state(self) -> EngineState:
        return self._state

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return len(self._open)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        """The request's deltas. Raises Overloaded, RequestError or EngineError before the first one.

        Under load a delta after the first holds all tokens of an interval (`Cadence`).
        """
        opened = self._admit(request)
        finished, pause_s = False, 0.0
        try:
            self.send(Add(request))
            while not finished:
                try:
                    delta = await opened.queue.get(pause_s)
                except Exception:
                    finished = True
                    raise
                finished = delta.finish_reason is not None
                yield delta
                pause_s = self._cadence.interval_s(len(self._open))
        finally:
            self._forget(opened)
            if not finished:
                self.send(Abort(request.id))

    def drain(self) -> None:
        """Take no new requests; the open ones go on."""
        if self._state.name != "dead":
            self._state = EngineState("draining", "the server is shutting down")

    def fail(self, reason: str, code: str = "engine_dead") -> None:
        """The engine is gone: end every open request with this cause. The first cause stays."""
        if self._state.name == "dead":
            return
        self._state = EngineState("dead", reason)
        for opened in list(self._open.values()):
            done = FinishReason.ERROR
            delta = Delta(
                id=opened.request.id,
                index=opened.received,
                token_ids=[],
                finish_reason=done,
                error=reason,
                error_code=code,
            )
            opened.queue.put_nowait(delta)

    def send(self, command: Command) -> None:
        """Tell the engine, in order, now or as soon as it has room. A dead engine is told nothing."""
        if self._closed or self._state.name == "dead":
            return
        self._unsent.append(encode(command))
        if len(self._unsent) == 1:
            self._flush()

    async def close(self) -> None:
        """End what is open, stop the engine's loop and this end of the channels. Idempotent."""
        if self._closed:
            return
        self._unsent.clear()
        self.send(Stop())
        self.fail("the server was shut down", "shut_down")
        self._closed = True
        self._commands.close()
        self._reports.close()
        await asyncio.to_thread(self._thread.join, 5.0)

    def _admit(self, request: GenerateRequest) -> OpenRequest:
        if not self._state.accepts:
            code = {"draining": "draining", "loading": "loading"}.get(self._state.name)
            if code is None:
                raise EngineError(self._state.reason or "the engine is dead", code="engine_dead", status=503)
            raise Overloaded(self._state.reason or code, code=code, status=503)
        place = self._gate.enter(request.tenant, len(request.prompt_ids))
        opened = OpenRequest(request, place, received=len(request.output_ids))
        self._open[request.id] = opened
        return opened

    def _forget(self, opened: OpenRequest) -> None:
        self._gate.leave(opened.place, served=False)
        self._open.pop(opened.request.id, None)

    def _give_up(self, opened: OpenRequest) -> None:
        """Its reader does not keep up: end it, so that neither its pages nor its text are held any longer."""
        self.send(Abort(opened.request.id))
        del self._open[opened.request.id]
        text = f"the client is {MAX_UNREAD} tokens behind"
        done = Delta(
            id=opened.request.id,
            index=opened.received,
            token_ids=[],
            finish_reason=FinishReason.ERROR,
            error=text,
            error_code="client_too_slow",
        )
        opened.queue.put_nowait(done)

    def _flush(self) -> None:
        try:
            while self._unsent:
                self._commands.send(self._unsent[0], 0.0)
                self._unsent.popleft()
        except TimeoutError:
            self._loop.call_later(RETRY_S, self._flush)
        except ConnectionError as error:
            self._unsent.clear()
            self.fail(f"the engine cannot be reached: {error}")

    def _read(self) -> None:
        """The reader thread: one hand-over to the event loop per message."""
        while not self._closed:
            try:
                data = self._reports.recv(POLL_S)
            except ConnectionError:
                self._hand_over(Dead("the engine process has ended", "engine_dead"))
                return
            if data is not None:
                self._hand_over(decode_report(data))

    def _hand_over(self, report: Report) -> None:
        try:
            self._loop.call_soon_threadsafe(self._take, report)
        except RuntimeError:  # the event loop is closed: nobody is left to tell
            self._closed = True

    def _take(self, report: Report) -> None:
        if isinstance(report, Batch):
            self._cadence.observe(len(report.deltas), time.monotonic())
            for delta in report.deltas:
                if opened := self._open.get(delta.id):
                    self._gate.leave(opened.place, served=bool(delta.token_ids))
                    opened.received = delta.index + len(delta.token_ids)
                    opened.queue.put_nowait(delta)
                    if opened.queue.unread > MAX_UNREAD:
                        self._give_up(opened)
            if report.stats is not None:
                self._gate.observe(report.stats)
                if self._on_stats is not None:
                    self._on_stats(report.stats)
        elif isinstance(report, Refused):
            if opened := self._open.get(report.id):
                opened.queue.put_nowait(RequestError(report.message, param=report.param, code=report.code))
        elif not self._closed:
            self.fail(report.reason, report.code)
