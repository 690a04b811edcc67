"""The engine as the event loop sees it: requests go out as commands, each step's deltas come back as one message."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import msgspec

from tpqwen.config import ScheduleOptions
from tpqwen.engine.cadence import Cadence
from tpqwen.engine.gate import Gate, Place
from tpqwen.engine.inbox import Inbox
from tpqwen.engine.line import Line
from tpqwen.engine.messages import (
    Abort,
    Add,
    Batch,
    Command,
    Dead,
    Drain,
    Look,
    Lost,
    Refused,
    Report,
    Resume,
    Resumed,
    Seen,
    Started,
    Stop,
)
from tpqwen.engine.protocol import EngineState, Life, Work
from tpqwen.errors import EngineError, Overloaded, RequestError
from tpqwen.request import Delta, FinishReason, GenerateRequest
from tpqwen.step import Capacity, Snapshot, StepStats
from tpqwen.transport.channel import Receiver, Sender

MAX_UNREAD = 4096  # tokens; a client that is so far behind will not catch up

_log = logging.getLogger(__name__)


@dataclass
class OpenRequest:
    """One request on its way, with all that a new engine needs to go on with it.

    Its place in the queue is given up with its first delta.
    """

    request: GenerateRequest
    place: Place
    queue: Inbox = field(default_factory=Inbox)
    waiting: bool = True  # until its first delta
    ended: bool = False  # its end is in the queue, perhaps not read yet: the engine owes nothing more
    started: bool = False  # the present engine computes it, or has
    scored: bool = False  # the log-probabilities of its prompt, if it wants some, are there
    output_ids: list[int] = field(default_factory=list)  # every output token received, those it brought along included
    crashes: int = 0

    def resubmitted(self, *, crashed: bool) -> GenerateRequest:
        """The request as a new engine gets it, after the tokens received. crashed: an engine died, perhaps of it."""
        self.crashes += crashed and self.started
        self.started = False
        replace, params = msgspec.structs.replace, self.request.params
        if self.scored:
            params = replace(params, prompt_logprobs=None)
        return replace(self.request, params=params, output_ids=list(self.output_ids), crashes=self.crashes)


class EngineClient:
    """Implements engine.protocol.Engine over a pair of channels. All methods belong to one event loop and none waits.

    Every open request gets exactly one end, also when the engine dies: an error delta, or the exception that refused
    it. on_fault hears of Lost ranks and of a Dead engine; whoever gives it keeps the requests open by `degrade`,
    `reattach` and `recovered`, or ends them by `fail`. Without it a fault is the end.
    """

    def __init__(
        self,
        commands: Sender,
        reports: Receiver,
        capacity: Capacity,
        options: ScheduleOptions,
        on_stats: Callable[[StepStats], None] | None = None,
        *,
        on_fault: Callable[[Lost | Dead], None] | None = None,
        on_resumed: Callable[[Resumed], None] | None = None,
        queue_timeout_s: float = 0.0,
    ) -> None:
        self._capacity = capacity
        self._on_stats = on_stats
        self._on_fault = on_fault
        self._on_resumed = on_resumed
        self._life = Life()
        self._open: dict[str, OpenRequest] = {}
        self._gate = Gate(options, capacity, queue_timeout_s)
        self._cadence = Cadence()
        self._heard = 0.0  # when the engine last said something, or got its first request after a while
        self._loop = asyncio.get_running_loop()
        self._closed = False
        self._work = Work()
        self._resuming = False  # the engine has got its ranks back and has not said yet that they work
        self._tick: asyncio.TimerHandle | None = None  # when what the streams hold back goes out
        self._look: asyncio.Future[Snapshot | None] | None = None  # what the engine was asked and has not answered
        self._line: Line | None = Line(commands, reports, self._loop, self._take)

    @property
    def capacity(self) -> Capacity:
        return self._capacity

    @property
    def state(self) -> EngineState:
        return self._life.state

    @property
    def work(self) -> Work:
        return self._work

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return len(self._open)

    @property
    def silent_s(self) -> float:
        """Seconds since the engine last said something; 0 while it has no reason to, or has no ranks to do it with."""
        owed = self._resuming or (self._is_owed and self._life.degraded_since is None)
        return time.monotonic() - self._heard if owed else 0.0

    @property
    def _is_owed(self) -> bool:
        """Whether the engine has some request still to end."""
        return any(not opened.ended for opened in self._open.values())

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        """The request's deltas. Raises Overloaded, RequestError or EngineError before the first one.

        Under load a delta after the first holds all tokens of an interval (`Cadence`).
        """
        opened = self._admit(request)
        finished = False
        try:
            self.send(Add(request))
            while not finished:
                try:
                    delta = await opened.queue.get()
                except Exception:
                    finished = True
                    raise
                finished = delta.finish_reason is not None
                yield delta
        finally:
            self._forget(opened)
            if not finished:
                self.send(Abort(request.id))

    def check_room(self) -> None:
        """Raises Overloaded (queue_full) when the queue has no room for anybody, so that no work need be done first."""
        self._gate.check_room()

    async def look(self, timeout_s: float) -> Snapshot | None:
        """What the scheduler holds; None while there is no engine, or when it does not answer in time.

        A question that is still open is not asked again, so that one who is busy or stuck does not get them all later.
        """
        if self._line is None or self._closed or self._life.dead is not None:
            return None
        if self._look is None:
            self._look = self._loop.create_future()
            self.send(Look())
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(self._look)
        except TimeoutError:
            return None

    def drain(self) -> None:
        """Take no new requests; the open ones go on."""
        self._life.draining = True
        self.send(Drain())

    def reopen(self) -> None:
        """Take new requests again."""
        self._life.draining = False
        self.send(Drain(over=True))

    def degrade(self, reason: str) -> None:
        """Something is being replaced; open requests pause, new ones queue."""
        self._resuming = False
        self._life.degrade(reason)

    def recovered(self) -> None:
        """It has been replaced, and requests go on."""
        self._life.degraded_since = None

    def detach(self) -> None:
        """The engine process is gone: what it still had to say is not listened to. Until `reattach` nothing is sent."""
        self._answer_look(None)
        if self._line is not None:
            self._line.close()
            self._line = None

    def reattach(self, commands: Sender, reports: Receiver, capacity: Capacity) -> None:
        """A new engine process: it is told of every open request, each with the tokens received so far."""
        self.detach()
        self._capacity = capacity
        self._line = Line(commands, reports, self._loop, self._take)
        self._heard = time.monotonic()
        for opened in list(self._open.values()):
            if not opened.ended:
                self.send(Add(opened.resubmitted(crashed=True)))
        if self._life.draining:
            self.send(Drain())

    def fail(self, reason: str, code: str = "engine_dead") -> None:
        """The engine is gone for good: end every open request with this cause. The first cause stays."""
        if self._life.dead is not None:
            return
        self._life.dead, self._resuming = reason, False
        self.give_up(reason, code)

    def give_up(self, reason: str, code: str) -> None:
        """End every open request with this cause; the engine goes on."""
        for opened in list(self._open.values()):
            if not opened.ended:
                self._end(opened, reason, code)  # first: a line found broken ends all that have not ended
                self.send(Abort(opened.request.id))

    def send(self, command: Command) -> None:
        """Tell the engine, in order, when this turn of the loop ends and it has room. A dead one is told nothing."""
        if self._closed or self._line is None or self._life.dead is not None:
            return
        if isinstance(command, Resume):
            self._resuming, self._heard = True, time.monotonic()
        self._line.send(command)

    async def close(self) -> None:
        """End what is open, stop the engine's loop and this end of the channels. Idempotent."""
        if self._closed:
            return
        line = self._line
        if line is not None:
            line.drop_unsent()
        self.send(Stop())
        if line is not None:
            line.flush()
        self.fail("the server was shut down", "shut_down")
        self._closed = True
        if self._tick is not None:
            self._tick.cancel()
        self.detach()
        if line is not None:
            await asyncio.to_thread(line.join)

    def _admit(self, request: GenerateRequest) -> OpenRequest:
        state = self.state
        if not state.accepts:
            code = {"draining": "draining", "loading": "loading"}.get(state.name)
            if code is None:
                raise EngineError(state.reason or "the engine is dead", code=state.error_code, status=503)
            raise Overloaded(state.reason or code, code=code, status=503)
        place = self._gate.enter(request.tenant, len(request.prompt_ids))
        if not self._is_owed:
            self._heard = time.monotonic()
        opened = OpenRequest(request, place, output_ids=list(request.output_ids), crashes=request.crashes)
        self._open[request.id] = opened
        return opened

    def _forget(self, opened: OpenRequest) -> None:
        self._gate.leave(opened.place, served=False)
        self._open.pop(opened.request.id, None)

    def _end(self, opened: OpenRequest, reason: str, code: str) -> None:
        opened.ended = True
        opened.queue.put_nowait(
            Delta(
                id=opened.request.id,
                index=len(opened.output_ids),
                token_ids=[],
                finish_reason=FinishReason.ERROR,
                error=reason,
                error_code=code,
            )
        )

    def _take(self, report: Report) -> None:
        """One report, on the event loop."""
        if isinstance(report, Seen):  # says nothing about whether requests get on
            self._answer_look(report.snapshot)
            return
        self._heard = time.monotonic()
        if isinstance(report, Batch):
            self._take_batch(report)
        elif isinstance(report, Refused):
            self._refuse(report)
        elif self._closed:
            return
        elif isinstance(report, Started):
            self._note_started(report.ids)
        elif isinstance(report, Resumed):
            self._resuming = False
            if self._on_resumed is not None:
                self._on_resumed(report)
        elif self._on_fault is not None:
            self._on_fault(report)
        else:
            self.fail(report.reason, report.code)

    def _refuse(self, report: Refused) -> None:
        if opened := self._open.get(report.id):
            opened.ended = True
            opened.queue.put_nowait(RequestError(report.message, param=report.param, code=report.code))

    def _note_started(self, ids: list[str]) -> None:
        for request_id in ids:
            if opened := self._open.get(request_id):
                opened.started = True

    def _answer_look(self, snapshot: Snapshot | None) -> None:
        asked, self._look = self._look, None
        if asked is not None and not asked.done():
            asked.set_result(snapshot)

    def _take_batch(self, batch: Batch) -> None:
        self._cadence.observe(len(batch.deltas), self._heard)
        interval_s = self._cadence.interval_s(len(self._open))
        for delta in batch.deltas:
            self._take_delta(delta, hold=interval_s > 0)
        if interval_s > 0 and self._tick is None:
            self._tick = self._loop.call_later(interval_s, self._release)
        if batch.stats is not None:
            self._work = self._work.plus(batch.stats)
            self._gate.observe(batch.stats)
            if self._on_stats is not None:
                self._on_stats(batch.stats)

    def _release(self) -> None:
        self._tick = None
        for opened in self._open.values():
            opened.queue.release()

    def _take_delta(self, delta: Delta, hold: bool) -> None:
        """hold: its reader need not have it before the next tick, unless it is the request's first."""
        opened = self._open.get(delta.id)
        if opened is None or opened.ended:
            return
        token_ids = delta.token_ids
        if token_ids and delta.index != len(opened.output_ids):
            _log.error("request=%s expected index=%d got=%d", delta.id, len(opened.output_ids), delta.index)
            self._end(opened, "the engine lost or repeated a token of this request", "internal")
            self.send(Abort(delta.id))
            return
        if opened.waiting:
            opened.waiting = hold = False
            self._gate.leave(opened.place, served=bool(token_ids))
        else:  # said once, though a new engine says it again
            delta.cached_tokens = delta.queue_s = None
        if delta.prompt_logprobs is not None:
            opened.scored = True
        opened.output_ids += token_ids
        if delta.resumed > opened.crashes:
            opened.crashes = delta.resumed
        opened.ended = delta.finish_reason is not None
        unread = opened.queue.put_nowait(delta, hold=hold)
        if unread > MAX_UNREAD:  # neither its pages nor its text are to be held any longer
            del self._open[delta.id]
            self._end(opened, f"the client is {MAX_UNREAD} tokens behind", "client_too_slow")
            self.send(Abort(delta.id))
