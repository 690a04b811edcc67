"""Whether what ranks want fits into memory: refused with figures, before they start or where an allocation fails.

Without torch where nobody computes: its import takes seconds of a server's start.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tpqwen.config import Config, resolve_device
from tpqwen.errors import ConfigError
from tpqwen.machine import host_memory
from tpqwen.model.config import ModelConfig
from tpqwen.model.sizing import DTYPE_BYTES, Sizes, derive

EXHAUSTED = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
ASKED = re.compile(r"tried to allocate ([\d.]+) ?(\w+)", re.IGNORECASE)
OF_HOST = ("DefaultCPUAllocator", "can't allocate memory", "not enough memory")
CUDAS_OWN = "CUDA error: out of memory"  # not of torch's allocator: what CUDA needs for itself, or pinned memory
CUDAS_OWN_BYTES = 1 << 30  # the former is less
GIB = 1 << 30


def check_host_memory(config: Config, model: ModelConfig) -> None:
    """Ranks on CPUs: weights and KV caches of those on this machine within its memory. Raises ConfigError.

    Linux promises memory that it does not have, and ends whoever then writes to it without a word.
    """
    sizes = derive(config, model)
    if sizes.device == "cpu":
        _check_cpu_ranks(config, model, sizes)


def _check_cpu_ranks(config: Config, model: ModelConfig, sizes: Sizes) -> None:
    import torch

    from tpqwen.model.qwen3 import Qwen3
    from tpqwen.model.weights import weight_bytes
    from tpqwen.parallel.group import TPGroup
    from tpqwen.quant.schemes import SCHEMES
    from tpqwen.worker.kv_cache import block_bytes, blocks_on_cpu

    tp = config.parallel.tp
    ranks = tp if config.parallel.interface is None else 1  # several machines: this one has one rank at least
    with torch.device("meta"):
        rank = Qwen3(model, TPGroup(0, tp, None), scheme=SCHEMES[config.model.quantization])
    size, heads = DTYPE_BYTES[sizes.dtype], model.local_kv_heads(tp)
    per_block = block_bytes(model.num_hidden_layers, heads, sizes.block_size, model.head_dim, size)
    blocks = blocks_on_cpu(per_block, sizes.max_num_seqs, sizes.blocks_per_sequence)
    if config.cache.num_kv_blocks is not None:
        blocks = config.cache.num_kv_blocks + 1  # with the one that no sequence gets
    weights, cache = ranks * weight_bytes(rank, getattr(torch, sizes.dtype)), ranks * blocks * per_block
    if weights + cache > (memory := host_memory()):
        text = f"the weights take {weights / GIB:.1f} GiB and the KV cache {cache / GIB:.1f} GiB"
        help_ = "lower num_kv_blocks or max_model_len, or take a smaller model"
        raise ConfigError(f"{text}, and this machine has {memory / GIB:.1f} GiB of memory; {help_}")


@contextmanager
def refused_if_too_large(config: Config, folder: Path, rank: int) -> Iterator[None]:
    """Around a rank's first loading: what does not fit is a ConfigError, before or when an allocation fails."""
    check_host_memory(config, ModelConfig.from_folder(folder))
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(text in str(error) for text in EXHAUSTED):
            raise
        if resolve_device(config.parallel.device) == "cuda":
            text = _on_gpu(error, is_int8=config.model.quantization == "int8")
        else:
            text = f"{_on_host(error)}; lower num_kv_blocks or max_model_len, or take a smaller model"
        raise ConfigError(f"rank {rank} {text}") from error


def _on_gpu(error: BaseException, *, is_int8: bool) -> str:
    """Of a rank on a GPU, whichever memory it was that it did not get."""
    gpu, figures, asked = _gpu_bytes(), "", _asked(error)
    pinned = CUDAS_OWN in str(error) and gpu is not None and gpu[0] >= CUDAS_OWN_BYTES
    if pinned or isinstance(error, MemoryError) or any(text in str(error) for text in OF_HOST):
        text = _on_host(error, " beside its GPU's")
        return f"{text}; end other processes, or raise the container's limit or that of locked memory"
    if gpu is not None:
        free, total, held = gpu
        others = f"{(total - free - held) / GIB:.1f} GiB somebody else's"
        figures = f" {held / GIB:.1f} GiB are this rank's, {others}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
    text = f"needs more than its GPU has:{asked}{figures}".rstrip(":,")
    help_ = "use more ranks" if is_int8 else "use int8 weights or more ranks"
    return f"{text}; lower max_model_len, max_batched_tokens or num_kv_blocks, or {help_}"


def _gpu_bytes() -> tuple[int, int, int] | None:
    """Free, all and this process's; None when CUDA does not answer: after some errors it answers nothing any more."""
    import torch

    try:
        return *torch.cuda.mem_get_info(), torch.cuda.memory_reserved()
    except (RuntimeError, AssertionError):
        return None


def _on_host(error: BaseException, which: str = "") -> str:
    text = f"cannot have the memory that it needs{which}:{_asked(error)}"
    return f"{text} this machine has {host_memory() / GIB:.1f} GiB"


def _asked(error: BaseException) -> str:
    """What the allocator says that it was asked for, if it does."""
    found = ASKED.search(str(error))
    if found is None:
        return ""
    amount, unit = found.groups()
    return f" it asked for {int(amount) / GIB:.1f} GiB," if unit == "bytes" else f" it asked for {amount} {unit},"
