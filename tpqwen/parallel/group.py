"""The tensor-parallel group: rendezvous and the collectives. A group of one is the same class and does nothing.

Every collective is a visible line in the layer that needs it. None of them reads a value on the host, so they can be
captured in a CUDA graph. Between GPUs of one host small tensors go another way than large ones (parallel/peers.py).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store, _abort_process_group

from tpqwen.kernels import reference
from tpqwen.parallel.peers import Peers

LOOK_S = 20e-6

# torch 2.13 renames the operation and warns about the old name, which is the only one that 2.11 has.
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class TPGroup:
    """Rank `rank` of `size`. process_group is None for a group of one, and while a rank is between two groups.

    Layers hold this object for good; leaving and joining again only changes whom it talks to.
    """

    def __init__(self, rank: int, size: int, process_group: dist.ProcessGroup | None) -> None:
        self._releasing = threading.Lock()
        self.rank = rank
        self.size = size
        self.in_collective = False  # as of now: this rank waits for the others
        self._called_off = False
        self._group = process_group
        self._peers: Peers | None = None

    @staticmethod
    def single() -> TPGroup:
        """The group of one."""
        return TPGroup(0, 1, None)

    @property
    def called_off(self) -> bool:
        """Set by another thread: this rank is about to leave, whatever its pass waits for."""
        return self._called_off

    @called_off.setter
    def called_off(self, called_off: bool) -> None:
        self._called_off = called_off  # first: who sees an exchange end without its peers must see this
        if self._peers is not None:
            self._peers.stop(called_off)

    def add_reduced(self, partial: torch.Tensor, residual: torch.Tensor, *, ordered: bool = False) -> torch.Tensor:
        """residual + the sum of the ranks' partials, which may be overwritten. ordered: added up as by ordered_sum."""
        if self._peers is not None and self._peers.takes(partial, summed=True):
            self.check()
            return self._peers.add_up(partial, residual)
        return residual + (self.ordered_sum(partial) if ordered else self.all_reduce(partial))

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, in place; returns x."""
        self.check()
        if self._peers is not None and self._peers.takes(x, summed=True):
            return self._peers.add_up(x)
        if self.size > 1:
            self._together(dist.all_reduce, x)
        return x

    def ordered_sum(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks in rank order, in fp32, rounded once. all_reduce may add in an order of its own for each
        element, by the message's size and the element's place in it."""
        return reference.add_up(self.all_gather(x).unbind())

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Every rank's x stacked in rank order: [size, *x.shape]."""
        self.check()
        if self.size == 1:
            return x[None]
        if self._peers is not None and self._peers.takes(x, summed=False):
            return self._peers.gather(x.contiguous())
        out = torch.empty((self.size, *x.shape), dtype=x.dtype, device=x.device)
        self._together(_gather, out.view(-1), x.contiguous().view(-1))
        return out

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            self._together(dist.barrier)

    def check(self) -> None:
        """Raise ConnectionError once this rank is called off."""
        if self.called_off:
            raise ConnectionError(f"rank {self.rank} of {self.size} leaves its group")

    def wait_until(self, passed: Callable[[], bool]) -> None:
        """Wait for the device, which may be waiting for another rank that is gone: raises as `check` does, also when
        it has passed because the group was aborted, for then nothing that was computed means anything."""
        while not passed():
            self.check()
            time.sleep(LOOK_S)
        self.check()

    def join(self, store: Store, epoch: int, device_type: str, timeout_s: float) -> None:
        """Meet the other ranks of this epoch through the owner's store. Raises torch.distributed's errors on time-out.

        The epoch prefixes every key, so a rank left over from an earlier group cannot join. A group of one is
        joined already.
        """
        if self.size == 1:
            return
        self.called_off = False
        store = PrefixStore(f"epoch-{epoch}", store)
        dist.init_process_group(
            "nccl" if device_type == "cuda" else "gloo",
            store=store,
            rank=self.rank,
            world_size=self.size,
            timeout=timedelta(seconds=timeout_s),
            device_id=torch.device("cuda:0") if device_type == "cuda" else None,
        )
        self._group = dist.group.WORLD
        if device_type == "cuda":
            self._peers = self._peers or Peers(self.rank, self.size, torch.device("cuda:0"))
            self._peers.join(store, self._agreed)

    def leave(self) -> None:
        """End this process's membership, in agreement with the others. Idempotent."""
        if self._peers is not None:
            self._peers.leave()
        if self._group is not None:
            dist.destroy_process_group()
            self._group = None

    def release(self) -> None:
        """Of `abort` what frees a thread that NCCL holds up, once called_off is set; with gloo nothing.

        That thread may be anywhere in a pass: what it waits for on the device ends at once, with results that mean
        nothing. It must not begin another collective, which would wait for the end of this call, as this call waits for
        the end of all graphs that hold the communicator. A second caller waits for the first.
        """
        with self._releasing:
            if self._group is not None and dist.get_backend(self._group) == "nccl":
                _abort_process_group()
                self._group = None

    def abort(self) -> None:
        """End this process's membership whatever the others do: NCCL's kernels are released, gloo's peers see the
        connection close. No thread of this process may be in a collective. Idempotent."""
        self.release()
        self.leave()

    def _agreed(self, mine: bool) -> bool:
        """Whether it is so on every rank; waits for all of them."""
        answers = self.all_gather(torch.tensor([mine], dtype=torch.int32, device="cuda"))
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()  # type: ignore[no-untyped-call]
        self.wait_until(done.query)
        return bool(answers.all())

    def _together(self, collective: Callable[..., Any], *tensors: torch.Tensor) -> None:
        group = self._joined()
        self.in_collective = True
        try:
            collective(*tensors, group=group)
        except RuntimeError:
            self.check()  # an aborted communicator says so in words of its own
            raise
        finally:
            self.in_collective = False

    def _joined(self) -> dist.ProcessGroup:
        if self._group is None:
            raise RuntimeError(f"rank {self.rank} of {self.size} is in no group")
        return self._group


def join_group(rank: int, size: int, store: Store, epoch: int, device_type: str, timeout_s: float) -> TPGroup:
    """A new member of the group of this epoch. See TPGroup.join."""
    group = TPGroup(rank, size, None)
    group.join(store, epoch, device_type, timeout_s)
    return group
