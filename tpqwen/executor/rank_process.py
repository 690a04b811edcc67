"""One rank as a Ray actor's class: it loads, joins a group, serves steps, leaves the group and joins the next one.

Everything it holds can be rebuilt: weights, KV blocks, the last tokens. Weights are what a repair wants to keep.
"""

from __future__ import annotations

import gc
import logging
import os
import socket
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
import torch
from torch._C._distributed_c10d import TCPStore
from torch.distributed.distributed_c10d import PrefixStore

from tpqwen import logs
from tpqwen.config import Config, resolve_device
from tpqwen.errors import ConfigError
from tpqwen.executor.rank import serve_steps
from tpqwen.executor.titles import keep_title
from tpqwen.executor.wiring import Plain, join
from tpqwen.gpu import await_exit
from tpqwen.parallel.group import TPGroup
from tpqwen.step import Capacity, RankStats
from tpqwen.transport.channel import Receiver
from tpqwen.worker.worker import Worker

GPU_FREE_TIMEOUT_S = 15.0

_log = logging.getLogger(__name__)


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
    """Calls in order: load, or load alone and join; connect; then leave, join and connect again for each repair."""

    def __init__(self, options: dict[str, Any], rank: int) -> None:
        self._config = Config.load(options, {})
        self._rank = rank
        self._group = TPGroup(rank, self._config.parallel.tp, None)
        self._worker: Worker | None = None
        self._inbox: Receiver | None = None
        self._steps: threading.Thread | None = None
        self._joining = threading.Lock()
        logs.configure(self._config.server.log, f"rank {rank}/{self._config.parallel.tp}")
        keep_title(f"tpqwen rank {rank}/{self._config.parallel.tp}")

    def where(self) -> tuple[str, int]:
        """The Ray node and the process that this rank is."""
        return str(ray.get_runtime_context().get_node_id()), os.getpid()

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
            worker = Worker(self._config, Path(folder), self._group)
            capacity = worker.load()
        except ConfigError as error:
            return Refusal(str(error))
        worker.read_vocabulary()
        self._worker = worker
        return capacity

    def leave(self, timeout_s: float) -> bool:
        """Serve no more steps, forget all sequences and leave the group; the weights stay.

        False when that is not to be had within timeout_s: then this process is of no use any more.
        """
        if self._inbox is not None:
            self._inbox.close()
        if self._steps is not None:
            self._steps.join(timeout_s)
            if self._steps.is_alive():
                return False
        if self._worker is None or not self._joining.acquire(timeout=timeout_s):
            return False
        try:
            self._worker.leave()
        finally:
            self._joining.release()
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

    def _meet(self, meeting: Meeting) -> None:
        interface = self._config.parallel.interface or _loopback()
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")  # aborting is ours
        if self._group.size == 1:
            return
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
    begin, gpu = time.monotonic(), torch.cuda.get_device_properties(0)
    gone = await_exit(ended, str(gpu.uuid), GPU_FREE_TIMEOUT_S)
    text = "replaced processes %s off the GPU=%s after seconds=%.2f"
    _log.log(logging.INFO if gone else logging.ERROR, text, ended, gone, time.monotonic() - begin)


def _loopback() -> str:
    """Name of the loopback interface."""
    return next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
