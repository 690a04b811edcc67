"""Sizes that nobody should have to choose: derived once from the options, the model and the kind of device. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from tpqwen.config import Config, resolve_device
from tpqwen.errors import ConfigError
from tpqwen.kernels.attention_table import MAX_ROWS
from tpqwen.model.config import ModelConfig

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Sizes:
    """What every rank and the scheduler agree on. Lengths in tokens."""

    device: str  # cpu | cuda
    dtype: str
    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_batched_tokens: int

    @property
    def blocks_per_sequence(self) -> int:
        """Width of a block table."""
        return -(-self.max_model_len // self.block_size)


def derive(config: Config, model: ModelConfig) -> Sizes:
    """Options where given, defaults by device otherwise. Raises ConfigError naming both numbers.

    A CPU computes in float32: it is faster there than bfloat16 emulation and makes runs exactly comparable.
    A GPU's budget of 16,384 tokens is a prompt's, and decode rows come on top: no prompt loses its last tokens to them.
    Blocks of 64 tokens make one (block, head) tile 16 KB in bfloat16, one contiguous read for the attention kernel.
    """
    device = resolve_device(config.parallel.device)
    cuda = device == "cuda"
    dtype = config.model.dtype
    if dtype == "auto":
        dtype = model.dtype if cuda and model.dtype in ("bfloat16", "float16") else ("bfloat16" if cuda else "float32")
    max_len = config.model.max_model_len or model.max_position_embeddings
    if max_len > model.max_position_embeddings:
        raise ConfigError(
            f"max_model_len {max_len} is above the checkpoint's max_position_embeddings {model.max_position_embeddings}"
        )
    seqs = config.schedule.max_num_seqs or (256 if cuda else 64)
    if cuda and seqs > MAX_ROWS:
        raise ConfigError(f"max_num_seqs {seqs} is above the {MAX_ROWS} that decode together on a GPU")
    return Sizes(
        device=device,
        dtype=dtype,
        block_size=config.cache.block_size or (64 if cuda else 16),
        max_model_len=max_len,
        max_num_seqs=seqs,
        max_batched_tokens=max(config.schedule.max_batched_tokens or (16384 + seqs if cuda else 512), seqs),
    )
