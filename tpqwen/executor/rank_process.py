"""One rank as a Ray actor's class: it loads, joins a group, serves steps, leaves the group and joins the next one.

Everything it holds can be rebuilt: weights, KV blocks, the last tokens. Weights are what a repair wants to keep.
torch is imported when the actor begins, not with this module: who places ranks does without.
"""

from __future__ import annotations

import gc
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import ray

from tpqwen import logs
from tpqwen.config import Config, resolve_device
from tpqwen.errors import ConfigError
from tpqwen.executor.rank import serve_steps
from tpqwen.executor.titles import keep_title
from tpqwen.executor.wiring import Plain, join
from tpqwen.fit import refused_if_too_large
from tpqwen.gpu import await_exit
from tpqwen.step import Capacity, RankStats
from tpqwen.transport.channel import Receiver
from tpqwen.worker.builder import Builder

if TYPE_CHECKING:
    from tpqwen.worker.worker import Worker

GPU_FREE_TIMEOUT_S = 15.0
SETTLE_S = {"cpu": 0.2, "cuda": 1.0}  # for a step to end in a group that hangs, unless it waits for another rank
ABORT_AFTER_S = 0.25  # on a GPU, for a step to end once called off; then what it waits for is aborted under it
PLACES = 8  # of a call stack, in a log line

_log = logging.getLogger(__name__)


class Where(NamedTuple):
    """The Ray node and the process that a rank is, and the GPUs that it sees, as CUDA_VISIBLE_DEVICES has them."""

    node: str
    pid: int
    gpus: str


@dataclass(frozen=True)
class Meeting:
    """Where the ranks of one epoch find each other. secret: the prefix of all keys."""

    host: str
    port: int
    secret: str
    epoch: int
    timeout_s: float


@dataclass(frozen=True)
class Refusal:
    """A rank's ConfigError as an answer; Ray would wrap a raised one in a report of its own."""

    reason: str


class RankProcess:
    """Calls in order: load, or load alone and join; connect; then leave, join and connect again for each repair.

    With rank None it is a spare: a process that has imported everything and holds no GPU; `become` comes first then.
    """

    def __init__(self, options: dict[str, Any], rank: int | None) -> None:
        config = Config.load(options, {})
        starts = rank is not None and resolve_device(config.parallel.device) == "cuda"
        self._builder = Builder(config.parallel.tp) if starts else None  # imports as much as this process, beside it
        import_module("tpqwen.worker.worker")
        self._worker: Worker | None = None
        self._inbox: Receiver | None = None
        self._steps: threading.Thread | None = None
        self._joining = threading.Lock()
        self._name(config, rank)

    def where(self) -> Where:
        """Where this rank is."""
        node = str(ray.get_runtime_context().get_node_id())
        return Where(node, os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES", ""))

    def become(self, options: dict[str, Any], rank: int, gpus: str) -> Where:
        """A spare takes the place of a rank that has ended, and its GPUs: CUDA reads the variable when first used."""
        if gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = gpus
        self._name(Config.load(options, {}), rank)
        return self.where()

    def load(self, folder: str, meeting: Meeting | None, ended: tuple[int, ...] = ()) -> Capacity | Refusal:
        """Load this rank's shard and size the cache; a ConfigError is returned.

        meeting: join first, since sizing may run the whole model; None: the size is given, and `join` comes later.
        ended: processes of this node that have been replaced; their GPU memory is waited for.
        """
        try:
            if ended and resolve_device(self._config.parallel.device) == "cuda":
                _await_memory(ended)
            if meeting is not None:
                self._meet(meeting)
            from tpqwen.worker.worker import Worker

            worker = Worker(self._config, Path(folder), self._group, self._builder)
            fits = refused_if_too_large(self._config, Path(folder), self._group.rank)
            with nullcontext() if meeting is None else fits:  # a later rank's shard did fit once: worth another attempt
                capacity = worker.load()
        except ConfigError as error:
            return Refusal(str(error))
        worker.read_vocabulary()
        self._worker = worker
        return capacity

    def leave(self, timeout_s: float, hung: bool) -> bool:
        """Serve no more steps, forget all sequences and leave the group; the weights stay.

        False when that is not to be had within timeout_s: then this process is of no use any more. hung: some rank does
        not go on. It is this one if its step neither ends nor waits for another rank, which is known at once.
        """
        until = time.monotonic() + timeout_s
        if self._inbox is not None:
            self._inbox.close()
        if self._worker is not None:
            self._worker.call_off()
        if self._steps is not None and not self._steps_end(self._steps, until, hung):
            return False
        if self._worker is None:
            return False
        parting, parted = _aside("parting", self._part)
        parting.join(max(0.0, until - time.monotonic()))
        if not parted.done():
            _log.error("this rank cannot leave its group, for it is %s", _place(parting))
            return False
        parted.result()
        return True

    def join(self, meeting: Meeting) -> None:
        """Become a member of the group of the next epoch."""
        assert self._worker is not None
        with self._joining:
            self._meet(meeting)
            self._worker.rejoined()

    def connect(self, address: Plain, epoch: int) -> Plain | None:
        """Attach to the engine's steps and begin to serve them. Returns the address of the answers."""
        if address["type"] == "tcp":  # the engine accepts only once every rank has been called
            self._serve(lambda: self._dial_and_serve(address, epoch))
            return None
        inbox, outbox, answers = join(address, epoch=epoch)
        worker, self._inbox = self._worker, inbox
        assert worker is not None
        self._serve(lambda: serve_steps(worker, inbox, outbox, epoch=epoch, answers=self._rank == 0))
        return answers

    def wait(self) -> None:
        """Never returns: a pending call whose failure tells the owner at once that this process has ended."""
        threading.Event().wait()

    def stats(self) -> RankStats | None:
        """Slow numbers; None before loading."""
        return self._worker.stats() if self._worker is not None else None

    def peak_memory(self) -> int:
        """Bytes at most since this was last asked; 0 before loading."""
        return self._worker.peak_memory() if self._worker is not None else 0

    def _name(self, config: Config, rank: int | None) -> None:
        from tpqwen.parallel.group import TPGroup

        self._config = config
        self._rank, size = rank, config.parallel.tp
        name = "spare rank" if rank is None else f"rank {rank}/{size}"
        self._group = TPGroup(rank or 0, size, None)
        logs.configure(self._config.server.log, name)
        keep_title(f"tpqwen {name}")

    def _steps_end(self, steps: threading.Thread, until: float, hung: bool) -> bool:
        """Wait for the end of the steps, which have been called off.

        On a GPU a step may be in a launch that the queue has no room for, or in a copy, behind a collective that waits
        for a rank that is gone. Neither looks at anything, so NCCL is aborted under it: its kernels end, the step goes
        on and ends at its next look at the group. The abort itself ends with the graphs, in Worker.leave.
        """

        def wait(at_most_s: float = threading.TIMEOUT_MAX) -> None:
            steps.join(max(0.0, min(at_most_s, until - time.monotonic())))

        device = resolve_device(self._config.parallel.device)
        if device == "cuda":
            wait(ABORT_AFTER_S)
            if steps.is_alive():
                _log.warning("NCCL is aborted under this rank's step, which is %s", _place(steps))
                _aside("release", self._group.release)
        if hung:
            wait(SETTLE_S[device])
        if not hung or self._group.in_collective:
            wait()
        if steps.is_alive():
            _log.error("this rank cannot leave its group, for its step is %s", _place(steps))
        return not steps.is_alive()

    def _part(self) -> None:
        assert self._worker is not None
        with self._joining:
            self._worker.leave()

    def _meet(self, meeting: Meeting) -> None:
        interface = self._config.parallel.interface or _loopback()
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")  # aborting is ours
        if self._group.size == 1:
            return
        from torch._C._distributed_c10d import TCPStore
        from torch.distributed.distributed_c10d import PrefixStore

        timeout = timedelta(seconds=meeting.timeout_s)
        store = PrefixStore(meeting.secret, TCPStore(meeting.host, meeting.port, is_master=False, timeout=timeout))
        device = resolve_device(self._config.parallel.device)
        self._group.join(store, meeting.epoch, device, meeting.timeout_s)

    def _serve(self, target: Any) -> None:
        gc.collect()
        gc.freeze()  # weights, kernels and graphs stay; looking for garbage among them would pause steps
        gc.disable()
        self._steps = threading.Thread(target=target, name="steps", daemon=True)
        self._steps.start()

    def _dial_and_serve(self, address: Plain, epoch: int) -> None:
        assert self._worker is not None
        inbox, outbox, _ = join(address, epoch=epoch)
        self._inbox = inbox
        serve_steps(self._worker, inbox, outbox, epoch=epoch, answers=self._rank == 0)


def _await_memory(ended: tuple[int, ...]) -> None:
    """Wait until these processes have left this rank's GPU, whichever of them it was that used it."""
    import torch

    begin, gpu = time.monotonic(), torch.cuda.get_device_properties(0)
    gone = await_exit(ended, str(gpu.uuid), GPU_FREE_TIMEOUT_S)
    text = "replaced processes %s off the GPU=%s after seconds=%.2f"
    _log.log(logging.INFO if gone else logging.ERROR, text, ended, gone, time.monotonic() - begin)


def _aside(name: str, work: Callable[[], None]) -> tuple[threading.Thread, Future[None]]:
    """Do it in a thread that nobody has to wait for."""
    done: Future[None] = Future()

    def run() -> None:
        try:
            work()
            done.set_result(None)
        except BaseException as error:
            _log.exception("%s failed", name)
            done.set_exception(error)

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    return thread, done


def _place(thread: threading.Thread) -> str:
    """Where in the code a thread is, innermost first."""
    frame = sys._current_frames().get(thread.ident or 0)
    stack = traceback.extract_stack(frame)[-PLACES:] if frame is not None else []
    return " < ".join(f"in {f.name} ({Path(f.filename).name}:{f.lineno})" for f in reversed(stack))


def _loopback() -> str:
    """Name of the loopback interface."""
    return next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
