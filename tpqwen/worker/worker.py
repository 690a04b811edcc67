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

import numpy as np
import torch

from tpqwen.config import Config
from tpqwen.gpu import Gpu
from tpqwen.machine import num_cpus
from tpqwen.model.config import ModelConfig
from tpqwen.model.sizing import Sizes, derive
from tpqwen.parallel.group import TPGroup
from tpqwen.request import TokenLogprob
from tpqwen.step import Capacity, Ints, RankStats, RowParams, StepInput, StepOutput, ints
from tpqwen.worker.batch import Stager, chunk_parts, eager_chunks, stage, target_part
from tpqwen.worker.builder import Builder
from tpqwen.worker.drafts import DraftGraphs, accepted
from tpqwen.worker.graphs import DecodeGraphs
from tpqwen.worker.guides import GuideRows
from tpqwen.worker.load import Loaded, load
from tpqwen.worker.marks import Idle, Marks
from tpqwen.worker.mixed import MixedGraphs
from tpqwen.worker.peak import take_peak
from tpqwen.worker.prompt import Pooled, PromptScores
from tpqwen.worker.sampler import LogprobTensors, SampleKind, kind_of

COPIES = 4  # buffers that one step may take from the stager: edits and rows, admissions, histories, chunks


@dataclass(frozen=True)
class Run:
    """What is known of a pass when it has been launched; its numbers are on the host when it has ended.

    chunks_at: where its chunks' tokens begin in the ring, if not right behind the decode rows'. graphs_left: as
    StepOutput has it."""

    params: tuple[RowParams, ...] = ()
    logprobs: LogprobTensors | None = None
    prompt_scores: tuple[PromptScores, ...] = ()
    pooled: Pooled | None = None
    chunks_at: int | None = None
    graphs_left: int = 0


NOTHING = Run()


@dataclass(frozen=True)
class Where:
    """Which places of a ring row hold a pass's tokens: num_decode from the front, then those of the chunks."""

    num_decode: int
    count: int
    chunks_at: int | None

    def take(self, row: Ints) -> Ints:
        """The pass's tokens in row order."""
        if self.chunks_at is None:
            return row[: self.count]
        return np.concatenate([row[: self.num_decode], row[self.chunks_at :][: self.count - self.num_decode]])


@dataclass(frozen=True)
class Pending:
    """A launched step, complete once `done` has passed. before: the end of the step before, or the start of this one
    where the device was idle; None on a CPU, and of an idle step. graphs: captured before it was launched."""

    step: StepInput
    turn: int  # of the slots' ring
    tokens: Ints  # a row of the ring
    where: Where
    run: Run
    before: torch.cuda.Event | None
    done: torch.cuda.Event | None
    busy_s: float
    graphs: int


class Worker:
    """One tensor-parallel rank on one device."""

    def __init__(self, config: Config, folder: Path, group: TPGroup, builder: Builder | None = None) -> None:
        """builder: as load.load takes it."""
        self._config = config
        self._source = folder, ModelConfig.from_folder(folder), builder
        self._group = group
        self.sizes: Sizes = derive(config, self._source[1])
        cuda = self.sizes.device == "cuda"
        self._device = torch.device("cuda:0" if cuda else "cpu")
        if not cuda:
            torch.set_num_threads(config.parallel.threads or max(1, num_cpus() // group.size))
        self._pending: deque[Pending] = deque()
        self._busy_s = 0.0
        self._gpu = Gpu(str(torch.cuda.get_device_properties(0).uuid)) if cuda else None

    @torch.inference_mode()
    def load(self) -> Capacity:
        """Weights, cache, warm-up. Raises ConfigError with the tensor's name or the memory that is missing."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        folder, model, builder = self._source
        loaded: Loaded = load(self._config, model, self.sizes, folder, self._group, builder)
        self.runner, self._ahead = loaded.runner, loaded.ahead
        head = self.runner.model.lm_head
        shard = head.first_id, head.num_local
        self._guides = GuideRows(folder, model.vocab_size, *shard, self._device, self._group)
        self.runner.edits.guides = self._guides
        self._stager = Stager(self._device, COPIES * (self._config.schedule.depth + 2))
        self.rejoined()
        return loaded.capacity

    def read_vocabulary(self) -> None:
        """Read what guides need now, in the background; otherwise the first guided request waits for it."""
        self._guides.read()

    def submit(self, step: StepInput) -> None:
        """Launch one step. Steps run in the order submitted."""
        begin = time.perf_counter()
        before = self._pending[-1].done if self._pending else self._marks.set()
        self.graphs.wide = step.wide
        if step.edits_slots:
            self._edit(step)
        sampled_slots = self._rows
        if step.chunks:
            sampled_slots = (*self._rows, *(c.slot for c in step.chunks if c.sample))
        turn = self._turn
        tokens = self.runner.state.ring_row(turn)
        self._guides.select(sampled_slots)
        graphs = self.graphs.num_captured
        idle = not step.chunks and not sampled_slots
        if idle:
            run = Run(graphs_left=self._ahead.capture(self.graphs, self.mixed, self.drafts))
        elif step.speculate:
            run = self._speculate(step.speculate)
        else:
            run = self._run(step, sampled_slots) if step.chunks else self._decode(sampled_slots)
        where = Where(len(self._rows), len(sampled_slots), run.chunks_at)
        done = self._marks.set()
        self._guides.sampled(tokens, done)
        busy = 0.0 if done is not None or idle else time.perf_counter() - begin
        self._pending.append(Pending(step, turn, tokens, where, run, None if idle else before, done, busy, graphs))

    def ready(self) -> bool:
        """Whether collect would return at once."""
        if not self._pending:
            return False
        done = self._pending[0].done
        return done is None or bool(done.query())  # type: ignore[no-untyped-call]

    def collect(self) -> StepOutput:
        """The oldest launched step's output; waits for the device. Raises ConnectionError when called off meanwhile."""
        p = self._pending.popleft()
        busy = p.busy_s
        if p.done is not None:
            p.done.synchronize()
            busy = p.before.elapsed_time(p.done) / 1e3 if p.before is not None else 0.0
        self._busy_s += busy
        tokens, counts = p.where.take(p.tokens), b""
        bad_rows = tuple(np.flatnonzero(tokens < 0).tolist())
        if p.step.speculate:
            tokens, kept, bad_rows = accepted(p.tokens, p.where.count, p.step.speculate)
            counts = kept.tobytes()
        decodes = p.where.count > 0 and not p.step.chunks
        idle = self._idle.after(p.turn, decodes=decodes) if p.done is not None else None
        logprobs: tuple[tuple[int, TokenLogprob], ...] = ()
        if p.run.logprobs is not None:
            logprobs = tuple(p.run.logprobs.rows([r.logprobs for r in p.run.params]))
        output = StepOutput(
            p.step.epoch,
            p.step.step,
            tokens.tobytes(),
            bad_rows,
            logprobs,
            busy,
            prompt_logprobs=tuple((s.chunk, s.tokens()) for s in p.run.prompt_scores),
            pooled=p.run.pooled.rows(p.run.params) if p.run.pooled is not None else (),
            idle_s=idle,
            captured=self.graphs.num_captured > p.graphs,  # for it, or for the next one, whose launch it waited for
            graphs_left=p.run.graphs_left,
            counts=counts,
        )
        self._group.check()  # last of all: the device goes on when a group is aborted, with numbers that mean nothing
        return output

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
            graphs_pending=len(self._ahead),
            gpu=self._gpu.readings() if self._gpu else {},
            gpu_uuid=self._gpu.uuid if self._gpu else "",
            gpu_name=self._gpu.name if self._gpu else "",
            throttle_reasons=self._gpu.throttle_reasons() if self._gpu else (),
        )

    def peak_memory(self) -> int:
        """Bytes at most since this was last asked, as peak.take_peak counts them."""
        return take_peak(self._device)

    def call_off(self) -> None:
        """From another thread, before `leave`: a GPU's rank that captures a graph, launches a pass or collects one ends
        with a ConnectionError at its next collective or look at the device, and answers nothing any more. On a CPU a
        rank that leaves finishes its step."""
        self._group.called_off = self._device.type == "cuda"

    def leave(self) -> None:
        """Forget all sequences and leave the group, whatever its other members do; the weights stay. No step may be
        submitted or collected meanwhile, and the next comes after `rejoined`. The group may be in the middle of an
        abort, which then ends here: it waits for the graphs."""
        self._pending.clear()
        self._guides.forget()
        self._drop_graphs()
        self._group.abort()
        if self._device.type == "cuda":
            torch.cuda.synchronize()  # what the aborted collectives held up runs out, into blocks nobody knows any more

    @torch.inference_mode()
    def rejoined(self) -> None:
        """The group is there, for the first time or again: no slot is taken, and graphs are captured when needed."""
        self._group.called_off = False
        self._rows: tuple[int, ...] = ()
        self._kind = SampleKind()
        state = self.runner.state.tensors
        self._turn = int(state.turn)  # passes begun, as on the device
        self._idle = Idle(state.stamps.numpy())
        self._marks = Marks(self._device, 2 * (self._config.schedule.depth + 2))
        sizes, cuda = self.sizes, self._device.type == "cuda"
        self.graphs = DecodeGraphs(self.runner, self._group, sizes.max_num_seqs, enabled=cuda)
        self.mixed = MixedGraphs(self.runner, self.graphs, sizes.max_num_seqs, sizes.block_size, enabled=cuda)
        self.drafts = DraftGraphs(self.runner, self.graphs, enabled=cuda)
        self._ahead.renew()

    def close(self) -> None:
        """Leave the group together with the others and free the device."""
        self._pending.clear()
        self._drop_graphs()
        if hasattr(self, "runner"):
            self._ahead.close()
            del self.runner
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        self._group.leave()

    def _drop_graphs(self) -> None:
        """Before the communicator that they hold goes: destroying it would wait for them."""
        if hasattr(self, "graphs"):
            self.drafts.forget()
            self.mixed.forget()
            self.graphs.forget()
            del self.drafts, self.mixed, self.graphs
        gc.collect()

    @torch.inference_mode()
    def _edit(self, step: StepInput) -> None:
        """What the step changes in the slots before its pass."""
        slots = stage(step, self.runner.state, self._stager)
        for a in step.admits:
            self.runner.state.params[a.slot] = a.params
            self._guides.admit(a)
        with_history = [a for a in step.admits if a.history]
        histories = self._stager.send([ints(a.history) for a in with_history]) if with_history else []
        for a, history in zip(with_history, histories, strict=True):
            self.runner.edits.admit(a.slot, history, a.num_prompt)
        if step.decode is not None and slots is not None:
            self._rows = tuple(ints(step.decode).tolist())
            self.graphs.set_rows(slots)
            self._kind = kind_of(self._params(self._rows))

    @torch.inference_mode()
    def _run(self, step: StepInput, sampled_slots: tuple[int, ...]) -> Run:
        """Launch a pass with chunks; params (host copies) go along only where they are needed."""
        self._turn += 1
        new = self._params(sampled_slots[len(self._rows) :])
        kind = self._kind | kind_of(new)
        parts = chunk_parts(step.chunks)
        plain = not any(c.targets for c in step.chunks) and all(p.pooling is None for p in new)
        if plain and self.mixed.fits(parts[0].size, len(step.chunks), kind):
            return Run(chunks_at=self.mixed.run(parts, kind, self._stager))
        runner, params = self.runner, self._params(sampled_slots)
        *sent, targets = self._stager.send([*parts, target_part(step.chunks)])
        chunks = eager_chunks(step.chunks, sent, runner.state, self.sizes.block_size, targets)
        rows = self.mixed.rows(len(new)) if plain and kind.in_graph else self.graphs.rows
        sampled = runner.mixed(rows, chunks, kind, params, wide=step.wide)
        if sampled is None:
            return Run(params, chunks_at=len(rows))
        sampled = sampled.to_host()
        return Run(params, sampled.logprobs, sampled.prompt_scores, sampled.pooled, len(rows))

    def _decode(self, slots: tuple[int, ...]) -> Run:
        self._turn += 1
        if self._kind.in_graph:
            self.graphs.decode(self._kind)
            return NOTHING
        return self._decode_edited(slots)

    def _speculate(self, count: int) -> Run:
        self._turn += 1
        self.drafts.run(self._kind, count)
        return NOTHING

    @torch.inference_mode()
    def _decode_edited(self, slots: tuple[int, ...]) -> Run:
        """A pass whose sampling takes host decisions."""
        params = self._params(slots)
        sampled = self.runner.sample(self.graphs.decode_logits(), self.graphs.rows, self._kind, params)
        return Run(params, sampled.to_host().logprobs)

    def _params(self, slots: tuple[int, ...]) -> tuple[RowParams, ...]:
        return tuple(self.runner.state.params[s] for s in slots)
