"""The engine's loop around EngineCore: commands in, one report per step out. The same in a process and in a thread."""

from __future__ import annotations

import logging

from tpqwen.engine.core import EngineCore
from tpqwen.engine.messages import (
    Abort,
    Add,
    Batch,
    Command,
    Dead,
    RanksLost,
    Refused,
    Report,
    Stop,
    decode_command,
    encode,
)
from tpqwen.errors import EngineError, RankDied, RequestError
from tpqwen.request import Delta, FinishReason
from tpqwen.transport.channel import Receiver, Sender

SEND_TIMEOUT_S = 30.0
IDLE_S = 0.5

_log = logging.getLogger(__name__)


class EngineLoop:
    """Runs until Stop comes or the commands' other end is gone."""

    def __init__(self, core: EngineCore, commands: Receiver, reports: Sender) -> None:
        self._core = core
        self._commands = commands
        self._reports = reports
        self._dead: EngineError | None = None
        self._stopped = False

    def run(self) -> None:
        """The loop. Returns when it is told to stop."""
        try:
            while not self._stopped:
                self._take_commands()
                if self._dead is None and self._core.has_work:
                    self._step()
        except ConnectionError:
            _log.info("the other end of the engine's channel is gone")
        finally:
            self._reports.close()

    def _take_commands(self) -> None:
        """All commands that are here; waits for one when there is nothing to run."""
        busy = self._dead is None and self._core.has_work
        data = self._commands.recv(0.0 if busy else IDLE_S)
        while data is not None and not self._stopped:
            self._handle(decode_command(data))
            data = self._commands.recv(0.0)

    def _handle(self, command: Command) -> None:
        if isinstance(command, Add):
            self._add(command)
        elif isinstance(command, Abort):
            self._core.abort(command.id)
        elif isinstance(command, RanksLost):
            self._die(RankDied(command.reason, rank=command.rank))
        elif isinstance(command, Stop):
            self._stopped = True

    def _add(self, command: Add) -> None:
        request = command.request
        if self._dead is not None:
            delta = Delta(
                id=request.id,
                index=len(request.output_ids),
                token_ids=[],
                finish_reason=FinishReason.ERROR,
                error=str(self._dead),
                error_code=self._dead.code,
            )
            self._send(Batch([delta]))
            return
        try:
            self._core.add(request)
        except RequestError as error:
            self._send(Refused(request.id, str(error), error.param, error.code))

    def _step(self) -> None:
        try:
            result = self._core.step()
        except EngineError as error:
            self._die(error)
            return
        except Exception as error:  # a bug of ours must not leave requests without an end
            _log.exception("the engine's step failed")
            self._die(EngineError(f"the engine's step failed: {type(error).__name__}: {error}"))
            return
        if result.deltas or result.stats is not None:
            self._send(Batch(result.deltas, result.stats))

    def _die(self, error: EngineError) -> None:
        """End every request with the cause. The core keeps nothing; a later repair would call core.restart instead."""
        if self._dead is not None:
            return
        _log.error("engine dead reason=%s", error)
        self._dead = error
        self._core.fail(error)
        self._send(Batch(self._core.take_deltas()))
        self._send(Dead(str(error), error.code))

    def _send(self, report: Report) -> None:
        self._reports.send(encode(report), SEND_TIMEOUT_S)
