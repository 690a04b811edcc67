"""The engine in this process: the same core and workers as the server, driven by whoever iterates over the deltas."""

from __future__ import annotations

import gc
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from typing import Protocol

from tpqwen import ray_token
from tpqwen.budget import REPAIRS, Budget
from tpqwen.config import Config, resolve_device
from tpqwen.engine.core import EngineCore
from tpqwen.errors import RankDied
from tpqwen.executor.protocol import Executor
from tpqwen.model.checkpoint import Checkpoint
from tpqwen.model.config import ModelConfig, check_parallel
from tpqwen.model.hashes import check_hashes
from tpqwen.model.hub import resolve_model
from tpqwen.request import Deltas, GenerateRequest, SamplingParams
from tpqwen.step import StepStats
from tpqwen.text.sequences import Limits, expand
from tpqwen.worker.builder import Builder


class OwnRanks(Executor, Protocol):
    """An executor whose ranks are this process's own."""

    def peak_memory(self) -> list[int]:
        """Bytes of each rank's memory at most since this was last asked. Raises RankDied."""


class OfflineEngine:
    """Loads on construction. tp 1 runs in this process, more ranks run as Ray actors. Close it to free the device."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.folder = resolve_model(config.model.model, config.model.revision)
        self.model_config = ModelConfig.from_folder(self.folder)
        check_parallel(self.model_config, config.parallel.tp)
        if not config.model.random_weights:
            check_hashes(self.folder, Checkpoint(self.folder).files.values(), config.model.verify)
        self.executor = self._make_executor()
        self.capacity = self.executor.start()
        self.core = self.new_core()
        self.on_stats: Callable[[StepStats], None] | None = None  # hears of every step that ended
        self._repairs = Budget(REPAIRS)

    def _make_executor(self) -> OwnRanks:
        """torch is imported here, behind the process that compiles kernels, and Ray only for more than one rank."""
        executor: OwnRanks
        if self.config.parallel.tp == 1:
            builder = Builder(1) if resolve_device(self.config.parallel.device) == "cuda" else None
            executor = import_module("tpqwen.executor.local").LocalExecutor(self.config, self.folder, builder)
        else:
            if "ray" not in sys.modules:
                ray_token.guard(os.environ)
            executor = import_module("tpqwen.executor.ray").RayExecutor(self.config, self.folder)
        return executor

    def new_core(self) -> EngineCore:
        """A fresh scheduler and an empty cache over the same loaded ranks."""
        core = EngineCore(
            self.executor,
            self.capacity,
            schedule=self.config.schedule,
            prefix_cache=self.config.cache.prefix_cache,
            epoch=getattr(self.executor, "epoch", 0),
            compiles=resolve_device(self.config.parallel.device) == "cuda",
        )
        core.paced = False
        return core

    @property
    def limits(self) -> Limits:
        """What a prompt may ask of this model."""
        model = self.model_config
        return Limits(self.capacity.max_model_len, model.vocab_size, model.eos_token_ids)

    def request(self, prompt_ids: list[int], params: SamplingParams) -> GenerateRequest:
        """One sequence (params.n must be 1) with its defaults resolved. Raises RequestError."""
        return expand(secrets.token_hex(8), prompt_ids, params, self.limits)[0]

    def run(self, requests: Iterable[GenerateRequest]) -> Iterator[Deltas]:
        """Deltas step by step until every request has ended. Abandoning the iterator aborts what is left."""
        open_ids = set()
        for r in requests:
            self.core.add(r)
            open_ids.add(r.id)
        try:
            while open_ids:
                deltas = self._step()
                open_ids.difference_update(d.id for d in deltas.others if d.finish_reason)
                yield deltas
        finally:
            for request_id in open_ids:
                self.core.abort(request_id)
            while open_ids and self.core.has_work:
                self._step()

    def _step(self) -> Deltas:
        """One step. Ranks that die under it are replaced, and it takes longer. Raises EngineError."""
        try:
            result = self.core.step()
        except RankDied as error:
            if not self._repairs.take(time.monotonic()):
                raise
            capacity = self.executor.repair(error)
            self.core.restart(getattr(self.executor, "epoch", 0), capacity)
            return Deltas(others=self.core.take_deltas())
        if self.on_stats is not None and result.stats is not None:
            self.on_stats(result.stats)
        return result.deltas

    def close(self) -> None:
        """Stop the ranks and free their memory. Idempotent."""
        self.executor.stop()
        gc.collect()
