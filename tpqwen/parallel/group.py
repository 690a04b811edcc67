"""The tensor-parallel group: rendezvous and the three collectives. A group of one is the same class and does nothing.

Every collective is a visible line in the layer that needs it. None of them reads a value on the host, so they can be
captured in a CUDA graph.
"""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

# torch 2.13 renames the operation and warns about the old name, which is the only one that 2.11 has.
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class TPGroup:
    """Rank `rank` of `size`. process_group is None exactly when size is 1."""

    def __init__(self, rank: int, size: int, process_group: dist.ProcessGroup | None) -> None:
        self.rank = rank
        self.size = size
        self._group = process_group

    @staticmethod
    def single() -> TPGroup:
        """The group of one."""
        return TPGroup(0, 1, None)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, in place; returns x."""
        if self._group is not None:
            dist.all_reduce(x, group=self._group)
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Every rank's x stacked in rank order: [size, *x.shape]."""
        if self._group is None:
            return x[None]
        out = torch.empty((self.size, *x.shape), dtype=x.dtype, device=x.device)
        _gather(out.view(-1), x.contiguous().view(-1), group=self._group)
        return out

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self._group is not None:
            dist.barrier(group=self._group)

    def leave(self) -> None:
        """End this process's membership. Idempotent."""
        if self._group is not None:
            dist.destroy_process_group()
            self._group = None


def join_group(rank: int, size: int, store: Store, epoch: int, device_type: str, timeout_s: float) -> TPGroup:
    """Meet the other ranks of this epoch through the caller's store. Raises torch.distributed's errors on time-out.

    The epoch prefixes every key, so a rank left over from an earlier group cannot join.
    """
    if size == 1:
        return TPGroup.single()
    dist.init_process_group(
        "nccl" if device_type == "cuda" else "gloo",
        store=PrefixStore(f"epoch-{epoch}", store),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout_s),
        device_id=torch.device("cuda:0") if device_type == "cuda" else None,
    )
    return TPGroup(rank, size, dist.group.WORLD)
