"""The engine core in a process of its own: a Ray actor of the replica, on the replica's node, without a GPU.

The replica creates it and the ranks, so its death leaves the ranks' weights loaded.
"""

from __future__ import annotations

import gc
import os
import threading
from typing import Any

import ray

from tpqwen import logs
from tpqwen.config import Config, resolve_device
from tpqwen.engine.core import EngineCore
from tpqwen.engine.loop import EngineLoop
from tpqwen.engine.messages import Resume
from tpqwen.executor.ranks import RingExecutor
from tpqwen.executor.titles import keep_title
from tpqwen.executor.wiring import Hub, Plain, interface_address
from tpqwen.step import Capacity
from tpqwen.transport.channel import from_plain, open_channel, to_plain
from tpqwen.transport.ring import RingWriter

CONNECT_TIMEOUT_S = 30.0


class EngineProcess:
    """Calls in order: open (addresses for the ranks), start (with the ranks' answers and the replica's commands).

    For each repair: open again; the new group's answers then come as a command, in order with the others.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self._config = Config.load(options, {})
        self._hub: Hub | None = None  # of the last `open`
        self._epoch = 0  # its
        self._executor: RingExecutor | None = None
        logs.configure(self._config.server.log, "engine")
        keep_title("tpqwen engine")

    def pid(self) -> int:
        return os.getpid()

    def open(self, rank_nodes: list[str], epoch: int) -> list[Plain | None]:
        """Where each rank finds its steps."""
        here = str(ray.get_runtime_context().get_node_id())
        host = interface_address(self._config.parallel.interface)
        self._hub, self._epoch = Hub(rank_nodes, here, epoch=epoch, interface=host), epoch
        return self._hub.addresses

    def start(self, answers: list[Plain | None], commands: Plain, capacity: Capacity, epoch: int) -> Plain:
        """Connect and begin to serve commands; returns the address of the reports."""
        compiles = resolve_device(self._config.parallel.device) == "cuda"
        core = EngineCore(
            self._attach(Resume(epoch, capacity, answers)),
            capacity,
            self._config.schedule,
            self._config.cache.prefix_cache,
            epoch=epoch,
            compiles=compiles,
            queue_timeout_s=self._config.server.queue_timeout,
        )
        address = from_plain(commands)
        assert address is not None
        inbox = open_channel(address, CONNECT_TIMEOUT_S)
        reports = RingWriter(1)
        loop = EngineLoop(core, inbox, reports, self._attach)
        threading.Thread(target=self._run, args=(loop,), name="engine", daemon=True).start()
        plain = to_plain(reports.address(0))
        assert plain is not None
        return plain

    def wait(self) -> None:
        """Never returns: a pending call whose failure tells the replica at once that this process has ended."""
        threading.Event().wait()

    def _attach(self, command: Resume) -> RingExecutor:
        """The way to the group that got the addresses of the last `open`. Raises ConnectionError, TimeoutError."""
        if self._hub is None or self._epoch != command.epoch:
            raise ConnectionError(f"the group of epoch {command.epoch} has been given up for that of {self._epoch}")
        links = self._hub.connect(command.answers)
        depth = self._config.schedule.depth
        cpu = resolve_device(self._config.parallel.device) == "cpu"
        self._executor = RingExecutor(command.capacity, links, depth=depth, epoch=command.epoch, idle_is_hung=cpu)
        return self._executor

    def _run(self, loop: EngineLoop) -> None:
        """What lives now lives for long; garbage is rare in the loop and is collected by reference counts."""
        gc.collect()
        gc.freeze()
        gc.disable()
        try:
            loop.run()
        finally:
            if self._executor is not None:
                self._executor.stop()
