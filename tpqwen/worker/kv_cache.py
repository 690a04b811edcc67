"""The paged KV cache of one rank: its own heads of every block, and how many blocks fit.

Per layer: K and V each [blocks, K heads, P tokens, D], so that one (block, head) is contiguous. In memory blocks come
first on GPUs, heads first on CPUs (kernels/cpu.py). Block 0 is never given to a sequence: padding rows may point at it.
"""

from __future__ import annotations

import torch

from tpqwen.errors import ConfigError

CPU_BUDGET_BYTES = 512 * 1024 * 1024
OWN_CONTEXT = 0.02  # of a GPU: what this process holds there besides tensors


class KVCache:
    """num_blocks blocks of block_size tokens for every layer. Zeroed: an unwritten value must not be NaN."""

    def __init__(
        self, *, num_layers: int, num_blocks: int, kv_heads: int, block_size: int, head_dim: int, like: torch.Tensor
    ) -> None:
        heads_first = like.device.type == "cpu"
        outer = (kv_heads, num_blocks) if heads_first else (num_blocks, kv_heads)
        self.data = torch.zeros(num_layers, 2, *outer, block_size, head_dim, dtype=like.dtype, device=like.device)
        layers = self.data.transpose(2, 3) if heads_first else self.data
        self.k = [layer[0] for layer in layers]
        self.v = [layer[1] for layer in layers]
        self.num_blocks = num_blocks
        self.block_size = block_size


def block_bytes(num_layers: int, kv_heads: int, block_size: int, head_dim: int, dtype_bytes: int) -> int:
    """Bytes of one block over all layers on this rank."""
    return 2 * num_layers * kv_heads * block_size * head_dim * dtype_bytes


def blocks_on_cpu(per_block: int, max_num_seqs: int, blocks_per_sequence: int) -> int:
    """Enough for every slot at full length, within CPU_BUDGET_BYTES, and never less than one full sequence."""
    wanted = max_num_seqs * blocks_per_sequence
    return max(min(wanted, CPU_BUDGET_BYTES // per_block), blocks_per_sequence) + 1


def blocks_on_gpu(
    per_block: int, blocks_per_sequence: int, fraction: float, peak_bytes: int, share: float = 1.0
) -> int:
    """What is left of `fraction` of the device after `peak_bytes` (weights and the largest step's activations).

    Memory that other processes hold counts against it. With a share below 1 this rank takes only that part of the
    fraction and the other ranks on the device keep to theirs; how much they hold so far is chance and does not count.
    Raises ConfigError when not even one sequence fits.
    """
    free, total = torch.cuda.mem_get_info()
    others = total - free - torch.cuda.memory_reserved() if share == 1.0 else 0
    left = int(total * fraction * share) - peak_bytes - others
    blocks = left // per_block
    if blocks < blocks_per_sequence + 1:
        need = (blocks_per_sequence + 1) * per_block / 2**30
        taken = f" (other processes hold {others / 2**30:.1f})" if others > OWN_CONTEXT * total else ""
        raise ConfigError(
            f"{max(left, 0) / 2**30:.1f} of the GPU's {total / 2**30:.0f} GiB is left for the KV cache{taken} but one"
            f" sequence of full length needs {need:.1f} GiB; lower max_model_len, raise memory_fraction or use more"
            " ranks (tp)"
        )
    return int(blocks)
