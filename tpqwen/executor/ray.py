"""Ray ranks and the engine in this process: the offline API with more than one rank."""

from __future__ import annotations

import os
from pathlib import Path

import ray

from tpqwen.budget import REPAIRS
from tpqwen.config import Config, resolve_device
from tpqwen.errors import ConfigError, EngineError, RankDied
from tpqwen.executor.rank_group import RankGroup
from tpqwen.executor.ranks import RingExecutor
from tpqwen.executor.wiring import Hub, interface_address
from tpqwen.step import Capacity, RankStats, StepInput, StepOutput


class RayExecutor:
    """Implements executor.protocol.Executor with Ray ranks and the engine in this process: the offline API with tp > 1.

    Starts a private Ray on this machine, whatever runs there, unless one is initialised already or RAY_ADDRESS names
    one.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        self.depth = config.schedule.depth
        self._owns_ray = not ray.is_initialized()
        if self._owns_ray:
            os.environ.setdefault("RAY_DISABLE_USAGE_STATS", "1")
            address = os.environ.get("RAY_ADDRESS") or "local"
            ray.init(address=address, include_dashboard=False, log_to_driver=False, configure_logging=False)
        self.ranks = RankGroup(config, folder)
        self._ring: RingExecutor | None = None

    def start(self) -> Capacity:
        """Load all ranks and connect to them. Raises ConfigError or EngineError."""
        try:
            capacity = self.ranks.load()
            self._connect(capacity)
        except (ConfigError, EngineError):
            self.stop()
            raise
        self.ranks.keep_spare()
        return capacity

    def repair(self, error: RankDied) -> Capacity:
        """Replace the dead rank, and whoever does not leave the old group. A death meanwhile is tried again."""
        assert self.ranks.capacity is not None
        if self._ring is not None:
            self._ring.stop()
        for attempt in range(REPAIRS):
            try:
                self.ranks.repair([] if error.rank is None else [error.rank], hung=error.rank is None)
                self._connect(self.ranks.capacity)
                break
            except RankDied as another:
                if attempt == REPAIRS - 1:
                    raise
                error = another
        self.ranks.keep_spare()
        return self.ranks.capacity

    @property
    def epoch(self) -> int:
        """What StepInput.epoch must be."""
        return self.ranks.epoch

    def submit(self, step: StepInput) -> None:
        """See RingExecutor."""
        assert self._ring is not None
        self._ring.submit(step)

    def collect(self, timeout_s: float) -> StepOutput:
        """See RingExecutor."""
        assert self._ring is not None
        return self._ring.collect(timeout_s)

    def ready(self) -> bool:
        """See RingExecutor."""
        assert self._ring is not None
        return self._ring.ready()

    def stats(self) -> list[RankStats]:
        """Slow numbers of every rank that answers."""
        return self.ranks.stats()

    def peak_memory(self) -> list[int]:
        """Bytes of each rank's memory at most since this was last asked. Raises RankDied."""
        return self.ranks.peak_memory()

    def _connect(self, capacity: Capacity) -> None:
        """Channels to the group as it is now. Raises RankDied."""
        here = str(ray.get_runtime_context().get_node_id())
        host = interface_address(self.ranks.config.parallel.interface)
        hub = Hub(self.ranks.nodes(), here, epoch=self.epoch, interface=host)
        answers = self.ranks.connect(hub.addresses)
        try:
            links = hub.connect(answers)
        except (ConnectionError, TimeoutError) as error:
            raise RankDied(f"a rank cannot be reached: {error}") from error
        cpu = resolve_device(self.ranks.config.parallel.device) == "cpu"
        self._ring = RingExecutor(capacity, links, depth=self.depth, epoch=self.epoch, idle_is_hung=cpu)

    def stop(self) -> None:
        """End the ranks, and Ray if it was started here. Idempotent."""
        if self._ring is not None:
            self._ring.stop()
            self._ring = None
        self.ranks.stop()
        if self._owns_ray and ray.is_initialized():
            ray.shutdown()
            self._owns_ray = False
