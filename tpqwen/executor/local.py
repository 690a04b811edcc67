"""One rank in this process: tests, the offline API and single-device work without Ray."""

from __future__ import annotations

from pathlib import Path

from tpqwen.config import Config
from tpqwen.errors import RankDied
from tpqwen.fit import refused_if_too_large
from tpqwen.parallel.group import TPGroup
from tpqwen.step import Capacity, RankStats, StepInput, StepOutput
from tpqwen.worker.builder import Builder
from tpqwen.worker.worker import Worker


class LocalExecutor:
    """Implements executor.protocol.Executor over a Worker of its own. tp must be 1."""

    def __init__(self, config: Config, folder: Path, builder: Builder | None = None) -> None:
        """builder: as the Worker takes it."""
        self.depth = config.schedule.depth
        self._config, self._folder = config, folder
        self._worker = Worker(config, folder, TPGroup.single(), builder)

    def start(self) -> Capacity:
        """Load the model here. Raises ConfigError."""
        with refused_if_too_large(self._config, self._folder, 0):
            return self._worker.load()

    def submit(self, step: StepInput) -> None:
        """Launch one step."""
        self._worker.submit(step)

    def collect(self, timeout_s: float) -> StepOutput:
        """The oldest step's output. There is nobody to wait for: timeout_s has no use here."""
        return self._worker.collect()

    def ready(self) -> bool:
        """Whether the oldest step is done."""
        return self._worker.ready()

    def repair(self, error: RankDied) -> Capacity:
        """The only rank is this process."""
        raise error

    def stats(self) -> list[RankStats]:
        """The one rank's slow numbers."""
        return [self._worker.stats()]

    def peak_memory(self) -> list[int]:
        """Of this process."""
        return [self._worker.peak_memory()]

    def stop(self) -> None:
        """Free the device."""
        self._worker.close()
