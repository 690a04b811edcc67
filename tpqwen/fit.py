"""Whether what ranks want fits into memory: refused with figures, before they start or where an allocation fails."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from tpqwen.config import Config, resolve_device
from tpqwen.errors import ConfigError
from tpqwen.model.config import ModelConfig
from tpqwen.model.qwen3 import Qwen3
from tpqwen.model.sizing import DTYPE_BYTES, derive
from tpqwen.model.weights import weight_bytes
from tpqwen.parallel.group import TPGroup
from tpqwen.quant.schemes import SCHEMES
from tpqwen.worker.kv_cache import block_bytes, blocks_on_cpu

EXHAUSTED = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
ASKED = re.compile(r"tried to allocate ([\d.]+) ?(\w+)", re.IGNORECASE)
CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
GIB = 1 << 30


def check_host_memory(config: Config, model: ModelConfig) -> None:
    """Ranks on CPUs: weights and KV caches of those on this machine within its memory. Raises ConfigError.

    Linux promises memory that it does not have, and ends whoever then writes to it without a word.
    """
    sizes = derive(config, model)
    if sizes.device != "cpu":
        return
    tp = config.parallel.tp
    ranks = tp if config.parallel.interface is None else 1  # several machines: this one has one rank at least
    with torch.device("meta"):
        rank = Qwen3(model, TPGroup(0, tp, None), scheme=SCHEMES[config.model.quantization])
    size, heads = DTYPE_BYTES[sizes.dtype], model.local_kv_heads(tp)
    per_block = block_bytes(model.num_hidden_layers, heads, sizes.block_size, model.head_dim, size)
    blocks = config.cache.num_kv_blocks or blocks_on_cpu(per_block, sizes.max_num_seqs, sizes.blocks_per_sequence)
    weights, cache = ranks * weight_bytes(rank, getattr(torch, sizes.dtype)), ranks * blocks * per_block
    if weights + cache > (memory := host_memory()):
        text = f"the weights take {weights / GIB:.1f} GiB and the KV cache {cache / GIB:.1f} GiB"
        help_ = "lower num_kv_blocks or max_model_len, or take a smaller model"
        raise ConfigError(f"{text}, and this machine has {memory / GIB:.1f} GiB of memory; {help_}")


def host_memory() -> int:
    """Bytes of memory that processes here may have: the machine's, or less by the container's limit."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in CGROUP_LIMITS:
        if path.is_file() and (text := path.read_text().strip()).isdigit():
            limits.append(int(text))
    return min(limits)


@contextmanager
def refused_if_too_large(config: Config, folder: Path, rank: int) -> Iterator[None]:
    """Around a rank's first loading: what does not fit is a ConfigError, before or when an allocation fails."""
    check_host_memory(config, ModelConfig.from_folder(folder))
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(text in str(error) for text in EXHAUSTED):
            raise
        cuda = resolve_device(config.parallel.device) == "cuda"
        raise ConfigError(f"rank {rank} {_on_gpu(error) if cuda else _on_cpu(error)}") from error


def _on_gpu(error: BaseException) -> str:
    free, total = torch.cuda.mem_get_info()
    held = torch.cuda.memory_reserved()
    text = f"needs more than its GPU has:{_asked(error)} {held / GIB:.1f} GiB are this rank's"
    others = f"{(total - free - held) / GIB:.1f} GiB somebody else's, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
    return (
        f"{text}, {others}; lower max_model_len, max_batched_tokens or num_kv_blocks, or use int8 weights or more ranks"
    )


def _on_cpu(error: BaseException) -> str:
    text = f"cannot have the memory that it needs:{_asked(error)} this machine has {host_memory() / GIB:.1f} GiB"
    return f"{text}; lower num_kv_blocks or max_model_len, or take a smaller model"


def _asked(error: BaseException) -> str:
    """What the allocator says that it was asked for, if it does."""
    found = ASKED.search(str(error))
    if found is None:
        return ""
    amount, unit = found.groups()
    return f" it asked for {int(amount) / GIB:.1f} GiB," if unit == "bytes" else f" it asked for {amount} {unit},"
