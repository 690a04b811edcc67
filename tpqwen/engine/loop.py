"""The engine's loop around EngineCore: commands in, one report per step out. The same in a process and in a thread.

Where the ranks can be replaced, losing them does not end it: it says Lost, goes on taking commands, and continues all
requests when Resume comes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from tpqwen.engine.core import EngineCore, StepResult
from tpqwen.engine.messages import (
    Abort,
    Add,
    Batch,
    Command,
    Dead,
    Drain,
    Look,
    Lost,
    RanksLost,
    Refused,
    Report,
    Resume,
    Resumed,
    Seen,
    Started,
    decode_command,
    each,
    encode,
)
from tpqwen.errors import EngineError, RankDied, RequestError
from tpqwen.executor.protocol import Executor
from tpqwen.request import Delta, Deltas, FinishReason
from tpqwen.scheduler.snapshot import snapshot
from tpqwen.transport.channel import Receiver, Sender

SEND_TIMEOUT_S = 30.0
IDLE_S = 0.5
LULL_S = 0.5  # without work, before a graph is captured ahead: the next request of one client is not to meet it
PATIENCE = 4.0  # or so many times what the last capture took: one that compiles kernels takes seconds

_log = logging.getLogger(__name__)
Attach = Callable[[Resume], Executor]
T = TypeVar("T")


class EngineLoop:
    """Runs until Stop comes or the commands' other end is gone.

    attach: makes an executor of Resume, raising ConnectionError, TimeoutError or EngineError. Without it nobody repairs
    anything, and whatever is lost is lost for good; so nothing is risked for graphs captured ahead either.
    """

    def __init__(self, core: EngineCore, commands: Receiver, reports: Sender, attach: Attach | None = None) -> None:
        self._core = core
        self._commands = commands
        self._reports = reports
        self._attach = attach
        self._dead: EngineError | None = None
        self._lost = False
        self._resumed_at: float | None = None  # when the ranks came back, until their first tokens are there
        self._stopped = False
        self._lull_ends = 0.0  # when graphs may be captured ahead; at once, as long as nobody has come
        self._idle_step_s = 0.0  # what the last idle step took, halved with each request that came before another
        self._rests = False  # there was nothing to run
        core.on_started = lambda ids: self._send(Started(ids))

    def run(self) -> None:
        """The loop. Returns when it is told to stop."""
        try:
            while not self._stopped:
                self._take_commands()
                if self._runs:
                    self._step()
                    continue
                self._rests = True
                if not self._stopped and self._wait_s == 0.0:
                    self._prepare()
        except ConnectionError:
            _log.info("the other end of the engine's channel is gone")
        finally:
            self._reports.close()

    @property
    def _runs(self) -> bool:
        """Whether there is a step to be made."""
        return self._dead is None and not self._lost and self._core.has_work

    @property
    def _wait_s(self) -> float:
        """For how long there is nothing to do but to listen: 0 when a step is to be made, be it an idle one."""
        if self._runs:
            return 0.0
        if self._dead is not None or self._lost or self._attach is None or not self._core.can_prepare:
            return IDLE_S
        return min(IDLE_S, max(0.0, self._lull_ends - time.monotonic()))

    def _take_commands(self) -> None:
        """All commands that are here; waits for one when there is nothing to run."""
        data = self._commands.recv(self._wait_s)
        while data is not None and not self._stopped:
            for command in each(decode_command(data)):
                self._handle(command)
            data = self._commands.recv(0.0)
        if self._lost:  # nobody steps, so the ends of aborted requests are told here
            self._send_deltas()

    def _handle(self, command: Command) -> None:
        if isinstance(command, Add):
            self._add(command)
        elif isinstance(command, Abort):
            self._core.abort(command.id)
        elif isinstance(command, RanksLost):
            if command.epoch == self._core.scheduler.epoch:
                self._lose(RankDied(command.reason, rank=command.rank))
        elif isinstance(command, Resume):
            self._resume(command)
        elif isinstance(command, Drain):
            if command.over:
                self._core.reopen()
            else:
                self._core.drain()
        elif isinstance(command, Look):
            self._send(Seen(snapshot(self._core.scheduler)))
        else:
            self._stopped = True

    def _add(self, command: Add) -> None:
        request = command.request
        if self._dead is not None:  # also with a successor on its way: that one is told of the request again
            if self._attach is not None:
                return
            delta = Delta(
                id=request.id,
                index=len(request.output_ids),
                token_ids=[],
                finish_reason=FinishReason.ERROR,
                error=str(self._dead),
                error_code=self._dead.code,
            )
            self._send(Batch(Deltas(others=[delta])))
            return
        try:
            self._core.add(request)
        except RequestError as error:
            self._send(Refused(request.id, str(error), error.param, error.code))
        except Exception as error:
            self._send(Started([request.id]))
            self._break(error)

    def _guarded(self, run: Callable[[], T]) -> T | None:
        """What it gives; None when it failed, which has been dealt with then."""
        try:
            return run()
        except EngineError as error:
            self._lose(error)
        except Exception as error:
            self._break(error)
        return None

    def _prepare(self) -> None:
        begin = time.monotonic()
        self._guarded(self._core.prepare)
        self._idle_step_s = time.monotonic() - begin

    def _step(self) -> None:
        if self._rests:
            self._rests, self._idle_step_s = False, self._idle_step_s / 2
        result = self._guarded(self._core.step)
        self._lull_ends = time.monotonic() + max(LULL_S, PATIENCE * self._idle_step_s)
        if result is None:
            return
        if result.deltas or result.stats is not None:
            self._send(Batch(result.deltas, result.stats))
        if self._resumed_at is not None:
            self._tell_resumed(result)

    def _lose(self, error: EngineError) -> None:
        """The ranks cannot go on: keep every request until somebody has repaired them, if there is anybody."""
        if self._attach is None:
            self._die(error)
        elif not self._lost and self._dead is None:
            silent_s = self._core.silent_s
            _log.error("ranks lost epoch=%d silent_s=%.2f reason=%s", self._core.scheduler.epoch, silent_s, error)
            self._lost = True
            self._core.executor.stop()
            rank = error.rank if isinstance(error, RankDied) else None
            ranks = [] if rank is None else [rank]
            self._send(Lost(self._core.scheduler.epoch, str(error), error.code, ranks, silent_s))

    def _resume(self, command: Resume) -> None:
        assert self._attach is not None
        if command.epoch != self._core.scheduler.epoch:
            try:
                executor = self._attach(command)
            except (ConnectionError, TimeoutError, EngineError) as error:
                text = f"the ranks cannot be reached: {error}"
                self._send(Lost(command.epoch, text, "rank_dead", [], 0.0))
                return
            self._core.restart(command.epoch, command.capacity, executor)
            self._lost = False
        self._resumed_at = time.monotonic()
        if not self._core.has_work:
            self._tell_resumed(StepResult(Deltas(), None))

    def _tell_resumed(self, result: StepResult) -> None:
        if self._resumed_at is not None and (_has_output(result) or not self._core.has_work):
            self._send(Resumed(self._core.scheduler.epoch, time.monotonic() - self._resumed_at))
            self._resumed_at = None

    def _die(self, error: EngineError) -> None:
        """Nothing can bring this engine back: end every request with the cause, or leave them to its successor."""
        if self._dead is not None:
            return
        _log.error("engine dead reason=%s", error)
        self._dead = error
        if self._attach is None:
            self._core.fail(error)
            self._send_deltas()
        self._send(Dead(str(error), error.code))

    def _break(self, error: Exception) -> None:
        """A bug of ours must not leave requests without an end."""
        _log.exception("the engine's step failed")
        self._die(EngineError(f"the engine's step failed: {type(error).__name__}: {error}"))

    def _send_deltas(self) -> None:
        """What the core has to say outside of steps."""
        if deltas := self._core.take_deltas():
            self._send(Batch(Deltas(others=deltas)))

    def _send(self, report: Report) -> None:
        self._reports.send(encode(report), SEND_TIMEOUT_S)


def _has_output(result: StepResult) -> bool:
    """Whether the ranks have brought some request forward; one for its prompt alone has no tokens."""
    own = (FinishReason.ABORT, FinishReason.ERROR)
    return result.stats is not None and any(d.finish_reason not in own for d in result.deltas)
