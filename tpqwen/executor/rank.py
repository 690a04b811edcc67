"""The loop of one rank: read a step, launch it, answer with its output; launches ahead while results are pending."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import time
from typing import Protocol

from tpqwen.step import StepInput, StepOutput, decode_input, encode
from tpqwen.transport.channel import Receiver, Sender

SEND_TIMEOUT_S = 30.0
IDLE_S = 0.5
PR_SET_TIMERSLACK = 29  # prctl(2)
PAUSE_S = 20e-6  # between looks at a device that is still computing

_log = logging.getLogger(__name__)


class StepWorker(Protocol):
    """What the loop needs of a Worker."""

    def submit(self, step: StepInput) -> None: ...

    def ready(self) -> bool: ...

    def collect(self) -> StepOutput: ...


def serve_steps(worker: StepWorker, inbox: Receiver, outbox: Sender, *, epoch: int, answers: bool) -> None:
    """Serve until the inbox is closed. answers: send outputs (rank 0); the other ranks send only their failures.

    A failure of the worker is told as StepOutput.error and ends the loop: this rank's state can no longer be trusted.
    Steps of another epoch are refused silently; whoever sends them belongs to a group that is gone.
    """
    _sleep_precisely()
    in_flight = 0
    try:
        while True:
            data = inbox.recv(0.0 if in_flight else IDLE_S)
            if data is not None:
                step = decode_input(data)
                if step.epoch != epoch:
                    _log.warning("step of epoch=%d refused, this is epoch=%d", step.epoch, epoch)
                    continue
                worker.submit(step)
                in_flight += 1
            if in_flight and worker.ready():
                output = worker.collect()
                in_flight -= 1
                if answers:
                    outbox.send(encode(output), SEND_TIMEOUT_S)
            elif in_flight and data is None:
                time.sleep(PAUSE_S)
    except ConnectionError as error:  # the engine's channel is gone, or this rank is called off
        _log.info("no more steps: %s", error)
    except Exception as error:  # whatever it is, the engine must hear of it: nobody looks into this process
        _log.exception("step failed")
        _tell(outbox, epoch, f"{type(error).__name__}: {error}")
    finally:
        outbox.close()


def _sleep_precisely() -> None:
    """Linux rounds this thread's sleeps up by 50 us unless told otherwise: more than two of our pauses."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0)


def _tell(outbox: Sender, epoch: int, text: str) -> None:
    try:
        outbox.send(encode(StepOutput(epoch, -1, b"", error=text)), SEND_TIMEOUT_S)
    except (ConnectionError, TimeoutError):
        _log.warning("nobody heard of the failure")
