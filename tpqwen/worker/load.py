"""From a checkpoint folder to a Runner that is ready to step: weights, cache size, warm-up, each stage timed."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tpqwen.config import Config
from tpqwen.model.config import ModelConfig, count_token_ids
from tpqwen.model.qwen3 import Qwen3, rope_table
from tpqwen.model.sizing import DTYPE_BYTES, Sizes
from tpqwen.model.weights import allocate, load_weights, random_weights, weight_bytes
from tpqwen.parallel.group import TPGroup
from tpqwen.quant.schemes import SCHEMES
from tpqwen.step import DRAFT_ROWS, MANY_CHUNKS, TOKEN_BUCKETS, Admit, Capacity, Chunk, RowParams, StepInput, packed
from tpqwen.worker.ahead import Ahead, Pass, Prompt, least_free, planned, prompts, wide_variants, with_drafts
from tpqwen.worker.batch import Stager, chunk_parts, eager_chunks, stage
from tpqwen.worker.builder import Builder
from tpqwen.worker.early import NUM_BLOCKS, NUM_LAYERS, Alone, Parts, compiled_beside, early_parts
from tpqwen.worker.kv_cache import KVCache, block_bytes, blocks_on_cpu, blocks_on_gpu
from tpqwen.worker.runner import Runner
from tpqwen.worker.sampler import LogitEdits, SampleKind, Sampler
from tpqwen.worker.slots import SlotState

LAYER_LAUNCH_S = 0.8e-3  # launching a layer kernel by kernel, on an H200's host; an H100's took half of that
FLOPS = 500e12  # what a GPU reaches in passes of some thousand tokens

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    runner: Runner
    ahead: Ahead
    capacity: Capacity


def load(
    config: Config,
    model_config: ModelConfig,
    sizes: Sizes,
    folder: Path,
    group: TPGroup,
    builder: Builder | None = None,
) -> Loaded:
    """Build the model, read this rank's slices, make the cache as large as memory allows. Raises ConfigError.

    builder: one that has been started already. It is closed here, or by whoever has what is returned.
    """
    if builder is None and sizes.device == "cuda":
        builder = Builder(group.size)
    with ExitStack() as failed:
        if builder:
            failed.callback(builder.close)
        loaded = _load(config, model_config, sizes, folder, group, builder)
        failed.pop_all()
    return loaded


def _load(
    config: Config, model_config: ModelConfig, sizes: Sizes, folder: Path, group: TPGroup, builder: Builder | None
) -> Loaded:
    clock = _Stages()
    build = _with_weights(config, model_config, sizes, folder, group, clock, builder)
    if builder:
        torch.cuda.empty_cache()  # of the early layers' memory
        clock.mark("kernels")
    heads = model_config.local_kv_heads(group.size)
    per_block = block_bytes(
        model_config.num_hidden_layers, heads, sizes.block_size, model_config.head_dim, DTYPE_BYTES[sizes.dtype]
    )
    if config.cache.num_kv_blocks is not None:
        blocks = config.cache.num_kv_blocks + 1
    elif sizes.device == "cpu":
        blocks = blocks_on_cpu(per_block, sizes.max_num_seqs, sizes.blocks_per_sequence)
    else:
        fraction, share = config.cache.memory_fraction, config.parallel.gpus_per_rank
        blocks = blocks_on_gpu(per_block, sizes.blocks_per_sequence, fraction, build.peak_bytes(), share)
    clock.mark("warmup")
    runner = build.runner(blocks)
    clock.mark("kv_alloc")
    ahead = Ahead(group)
    if builder:
        least = least_free(config.cache.memory_fraction, config.parallel.gpus_per_rank)
        ahead = Ahead(group, build.passes(runner), least, builder)
    capacity = Capacity(
        num_blocks=blocks,
        block_size=sizes.block_size,
        max_num_seqs=sizes.max_num_seqs,
        max_model_len=sizes.max_model_len,
        max_batched_tokens=sizes.max_batched_tokens,
        graph_tokens=TOKEN_BUCKETS[-1] if sizes.device == "cuda" else 0,
        graph_chunks=MANY_CHUNKS if sizes.device == "cuda" else 0,
        launch_tokens=_launch_tokens(model_config, group.size) if sizes.device == "cuda" else 0,
        graphs_ahead=len(ahead),
        context_cost=_context_cost(model_config),
        kv_dtype=sizes.dtype,
        load_seconds=clock.seconds,
        versions=_versions(),
    )
    return Loaded(runner, ahead, capacity)


def _with_weights(
    config: Config,
    model_config: ModelConfig,
    sizes: Sizes,
    folder: Path,
    group: TPGroup,
    clock: _Stages,
    builder: Builder | None,
) -> _Build:
    """A model with its weights; on a GPU the first kernels are compiled meanwhile."""
    device, dtype = torch.device("cuda:0" if sizes.device == "cuda" else "cpu"), getattr(torch, sizes.dtype)
    num_ids = count_token_ids(folder, model_config.vocab_size)
    scheme = SCHEMES[config.model.quantization]
    with torch.device("meta"):
        model = Qwen3(model_config, group, num_ids, invariant=config.model.deterministic, scheme=scheme)
    build = _Build(model, num_ids, model_config, sizes, group, device, dtype, config.schedule.num_drafts)
    with compiled_beside(build.early_parts, builder.build) if builder else nullcontext():
        if config.model.random_weights:
            random_weights(model, device=device, dtype=dtype, seed=0)
        else:
            load_weights(model, folder, device=device, dtype=dtype)
        clock.mark("weights")
    _log.info("weights dtype=%s quantization=%s bytes=%d", sizes.dtype, scheme.name, weight_bytes(model, dtype))
    return build


def _context_cost(c: ModelConfig) -> float:
    """Attention's multiplications with one token of context over those of a token's matrices, of one layer; doubled,
    because attention runs at about half the matrices' rate."""
    return 2.0 * 2 * c.num_attention_heads * c.head_dim / _layer_parameters(c)


def _launch_tokens(c: ModelConfig, ranks: int) -> int:
    """Tokens whose matrices in one layer take as long as launching its kernels one by one."""
    return int(LAYER_LAUNCH_S * FLOPS * ranks / (2 * _layer_parameters(c)))


def _layer_parameters(c: ModelConfig) -> int:
    """Of the matrices of one layer, of all ranks."""
    heads, kv_heads, d, h = c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.hidden_size
    return h * (heads + 2 * kv_heads) * d + heads * d * h + 3 * h * c.intermediate_size


def _versions() -> dict[str, str]:
    """What runs here, as Capacity has it."""
    versions = {"torch": str(torch.__version__)}
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
        versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return versions


class _Stages:
    """Seconds per stage, in order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def mark(self, stage_name: str) -> None:
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
        now = time.monotonic()
        self.seconds[stage_name] = round(now - self._last, 3)
        _log.info("loaded stage=%s seconds=%.2f", stage_name, now - self._last)
        self._last = now


@dataclass(frozen=True)
class _Build:
    """What a Runner is made of, to make one for measuring and one for service."""

    model: Qwen3
    num_ids: int | None  # as Qwen3 takes it
    config: ModelConfig
    sizes: Sizes
    group: TPGroup
    device: torch.device
    dtype: torch.dtype
    drafts: int = 0  # as SlotState takes it

    def runner(self, num_blocks: int) -> Runner:
        c, s = self.config, self.sizes
        cache = KVCache(
            num_layers=c.num_hidden_layers,
            num_blocks=num_blocks,
            kv_heads=c.local_kv_heads(self.group.size),
            block_size=s.block_size,
            head_dim=c.head_dim,
            like=torch.empty(0, dtype=self.dtype, device=self.device),
        )
        positions = s.blocks_per_sequence * s.block_size
        state = SlotState(s.max_num_seqs, s.blocks_per_sequence, self.device, positions=positions, drafts=self.drafts)
        head = self.model.lm_head
        sampler = Sampler(self.group, state.tensors, head.first_id, invariant=self.model.invariant)
        edits = LogitEdits(s.max_num_seqs, head.first_id, head.num_local, self.device)
        table = rope_table(c, s.max_model_len, self.device)
        return Runner(self.model, cache, state, sampler, edits, table)

    def passes(self, runner: Runner) -> list[Pass | Prompt]:
        """What idle steps make ready, in this order."""
        s = self.sizes
        usual = planned(s.max_num_seqs, s.max_batched_tokens, s.max_model_len)
        passes: list[Pass | Prompt] = [*with_drafts(usual, s.max_batched_tokens, self.drafts)]
        if self.dtype.itemsize == 2 and not self.model.invariant:
            passes += prompts(s.max_batched_tokens, s.max_model_len)
        return passes + wide_variants(usual, s.max_model_len, runner.has_wide)

    def early_parts(self) -> Parts:
        """What is compiled ahead: nothing, where the weights leave no room for layers of zeros."""
        alone = replace(self, group=Alone(self.group)).with_layers(NUM_LAYERS)
        needed = sum(weight_bytes(m, self.dtype) for m in (self.model, alone.model, alone.model))
        if torch.cuda.mem_get_info()[0] < needed:
            return Parts([], [], [])
        allocate(alone.model, self.device, self.dtype)
        runner = alone.runner(NUM_BLOCKS)
        return early_parts(runner, alone.group, self.passes(runner), self.drafts)

    def with_layers(self, count: int) -> _Build:
        """The same with so many layers, and no weights."""
        config = replace(self.config, num_hidden_layers=count)
        with torch.device("meta"):
            invariant, scheme = self.model.invariant, self.model.scheme
            model = Qwen3(config, self.group, self.num_ids, invariant=invariant, scheme=scheme)
        return replace(self, model=model, config=config)

    def peak_bytes(self) -> int:
        """Device memory at the largest step: as many prompt tokens as a step may hold, as many rows as may sample.

        Also compiles the kernels of that path before the server says it is ready.
        """
        s = self.sizes
        length = min(s.max_model_len, s.max_batched_tokens)
        count = max(1, min(s.max_batched_tokens // length, s.max_num_seqs))
        per_chunk = -(-length // s.block_size)
        runner = self.runner(count * per_chunk + 1)
        torch.cuda.reset_peak_memory_stats()
        params = RowParams(1.0, 20, 0.95, 0.0, 0, 0)
        ids = packed([0] * length)
        step = StepInput(
            epoch=0,
            step=0,
            admits=tuple(Admit(i, params, 0, length) for i in range(count)),
            blocks=packed([(i, j, 1 + i * per_chunk + j) for i in range(count) for j in range(per_chunk)]),
            chunks=tuple(Chunk(i, 0, ids, True) for i in range(count)),
            decode=b"",
        )
        stager = Stager(self.device, 3)
        stage(step, runner.state, stager)
        chunks = eager_chunks(step.chunks, stager.send(chunk_parts(step.chunks)), runner.state, s.block_size)
        none = torch.empty(0, dtype=torch.int32, device=self.device)
        runner.mixed(none, chunks, SampleKind(candidates=True), (params,) * count)
        sampled = max(s.max_num_seqs, min(s.max_num_seqs, DRAFT_ROWS) * (1 + self.drafts))
        rows = self.model.lm_head.num_local * sampled * 12  # all logits of a step at once: value, copy, index
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - runner.cache.data.nbytes + rows
        del runner, chunks
        torch.cuda.empty_cache()
        return peak
