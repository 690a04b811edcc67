"""One rank: loads its shard, sizes its cache, and turns StepInputs into StepOutputs in order.

submit launches a step and returns; collect waits for the oldest. On a GPU several steps may be in flight.
"""

from __future__ import annotations

import gc
import os
import socket
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import torch

from tpqwen.config import Config
from tpqwen.gpu import Gpu
from tpqwen.model.config import ModelConfig
from tpqwen.model.sizing import Sizes, derive
from tpqwen.parallel.group import TPGroup
from tpqwen.request import TokenLogprob
from tpqwen.step import Capacity, RankStats, RowParams, StepInput, StepOutput, ints
from tpqwen.worker.batch import ChunkBatch, Stager, stage
from tpqwen.worker.graphs import DecodeGraphs
from tpqwen.worker.load import Loaded, load
from tpqwen.worker.runner import Sampled
from tpqwen.worker.sampler import SampleKind, kind_of


@dataclass(frozen=True)
class Pending:
    """A launched step. The host tensors are filled once `done` has passed."""

    step: StepInput
    tokens: torch.Tensor  # int32, on the host
    bad: torch.Tensor  # bool, on the host
    sampled: Sampled | None
    params: tuple[RowParams, ...]
    started: torch.cuda.Event | None
    done: torch.cuda.Event | None
    busy_s: float


class Worker:
    """One tensor-parallel rank on one device."""

    def __init__(self, config: Config, folder: Path, group: TPGroup) -> None:
        self._config = config
        self._folder = folder
        self._group = group
        self._model_config = ModelConfig.from_folder(folder)
        self.sizes: Sizes = derive(config, self._model_config)
        cuda = self.sizes.device == "cuda"
        self._device = torch.device("cuda:0" if cuda else "cpu")
        if not cuda:
            torch.set_num_threads(config.parallel.threads or max(1, (os.cpu_count() or 1) // group.size))
        self._pending: deque[Pending] = deque()
        self._busy_s = 0.0
        self._gpu = Gpu(str(torch.cuda.get_device_properties(0).uuid)) if cuda else None

    @torch.inference_mode()
    def load(self) -> Capacity:
        """Weights, cache, warm-up. Raises ConfigError with the tensor's name or the memory that is missing."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        loaded: Loaded = load(self._config, self._model_config, self.sizes, self._folder, self._group)
        self.runner = loaded.runner
        self.graphs = DecodeGraphs(self.runner, self.sizes.max_num_seqs, enabled=self._device.type == "cuda")
        self._stager = Stager(self._device, self._config.schedule.depth + 2)
        self._rows: tuple[int, ...] = ()
        self._kind = SampleKind()
        return loaded.capacity

    @torch.inference_mode()
    def submit(self, step: StepInput) -> None:
        """Launch one step. Steps run in the order submitted."""
        begin = time.perf_counter()
        started = self._event()
        slots, chunks = stage(step, self.runner.state, self._stager, self.sizes.block_size)
        self._admit_history(step)
        self._follow_rows(step, slots)
        params = self._params(chunks)
        sampled = self._run(chunks, params)
        count = len(self._rows) + (len(chunks.sampled_slots_host) if chunks is not None else 0)
        tokens, bad = self._to_host(sampled, count)
        done = self._event()
        busy = 0.0 if done is not None else time.perf_counter() - begin
        self._pending.append(Pending(step, tokens, bad, sampled, params, started, done, busy))

    def ready(self) -> bool:
        """Whether collect would return at once."""
        if not self._pending:
            return False
        done = self._pending[0].done
        return done is None or bool(done.query())  # type: ignore[no-untyped-call]

    @torch.inference_mode()
    def collect(self) -> StepOutput:
        """The oldest launched step's output; waits for the device."""
        p = self._pending.popleft()
        busy = p.busy_s
        if p.started is not None and p.done is not None:
            p.done.synchronize()
            busy = p.started.elapsed_time(p.done) / 1e3
        self._busy_s += busy
        count = p.tokens.shape[0]
        logprobs: tuple[tuple[int, TokenLogprob], ...] = ()
        if p.sampled is not None and p.sampled.logprobs is not None:
            logprobs = tuple(p.sampled.logprobs.rows([r.logprobs for r in p.params]))
        bad = tuple(torch.nonzero(p.bad)[:, 0].tolist()) if count and bool(p.bad.any()) else ()
        return StepOutput(p.step.epoch, p.step.step, p.tokens.numpy().tobytes(), bad, logprobs, busy)

    def stats(self) -> RankStats:
        """Slow numbers: memory and NVML."""
        cuda = self._device.type == "cuda"
        return RankStats(
            rank=self._group.rank,
            pid=os.getpid(),
            host=socket.gethostname(),
            device=str(self._device),
            busy_s_total=self._busy_s,
            memory_allocated_bytes=torch.cuda.memory_allocated() if cuda else 0,
            gpu=self._gpu.readings() if self._gpu else {},
            gpu_uuid=self._gpu.uuid if self._gpu else "",
            gpu_name=self._gpu.name if self._gpu else "",
            throttle_reasons=self._gpu.throttle_reasons() if self._gpu else (),
        )

    def close(self) -> None:
        """Drop graphs before the communicator they hold, then leave the group."""
        self._pending.clear()
        if hasattr(self, "graphs"):
            del self.graphs, self.runner
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        self._group.leave()

    def _run(self, chunks: ChunkBatch | None, params: tuple[RowParams, ...]) -> Sampled | None:
        kind = kind_of(params) if chunks is not None else self._kind
        if chunks is not None:
            return self.runner.mixed(self.graphs.rows if self._rows else None, chunks, kind, params)
        if not self._rows:
            return None
        if kind.in_graph:
            return self.graphs.decode(kind)
        rows = self.graphs.rows
        return self.runner.sample(self.graphs.decode_logits(), rows.slots, rows.params, kind, params)

    def _admit_history(self, step: StepInput) -> None:
        for a in step.admits:
            if a.history:
                self.runner.edits.admit(a.slot, ints(a.history).tolist(), a.num_prompt)

    def _follow_rows(self, step: StepInput, slots: torch.Tensor | None) -> None:
        if step.decode is not None and slots is not None:
            self._rows = tuple(ints(step.decode).tolist())
            self.graphs.set_rows(slots)
            self._kind = kind_of([self.runner.state.params[s] for s in self._rows])
        elif step.blocks or step.admits:
            self.graphs.refresh()

    def _params(self, chunks: ChunkBatch | None) -> tuple[RowParams, ...]:
        """Host copies of the sampled rows' parameters, only where a step needs them."""
        if chunks is None and self._kind.in_graph:
            return ()
        sampled = (*self._rows, *(chunks.sampled_slots_host if chunks is not None else ()))
        return tuple(self.runner.state.params[s] for s in sampled)

    def _to_host(self, sampled: Sampled | None, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Start copying the first `count` results (the rest is a graph's padding)."""
        if sampled is None:
            return torch.empty(0, dtype=torch.int32), torch.empty(0, dtype=torch.bool)
        if self._device.type == "cpu":
            return sampled.tokens[:count].clone(), sampled.bad[:count].clone()
        both = torch.stack([sampled.tokens[:count], sampled.bad[:count].to(torch.int32)])
        host = torch.empty(both.shape, dtype=torch.int32, pin_memory=True)
        host.copy_(both, non_blocking=True)
        return host[0], host[1]

    def _event(self) -> torch.cuda.Event | None:
        if self._device.type == "cpu":
            return None
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event
