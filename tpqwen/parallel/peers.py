"""The ranks of one host as peers: they write into each other's memory, so small sums need no NCCL (kernels/exchange).

Each rank has an inbox for as long as its process lives and maps the others' for as long as their group lives. It takes
GPUs of one host with paths between them; the ranks agree, once in each epoch, whether all have it, else none uses it.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import msgspec
import torch
from torch.distributed.distributed_c10d import Store

from tpqwen.kernels import ops
from tpqwen.kernels.mailbox import Mailbox, blank, fits, inbox_shape
from tpqwen.parallel.device_memory import DriverError, SharedMemory, close_handle, open_handle

# Bytes of the largest message by number of ranks: above them the library's ring or tree is quicker, for every rank
# sends its whole message, and twice as large, to every other one.
LIMITS = {2: 2048 * 1024, 4: 512 * 1024, 8: 256 * 1024}

_log = logging.getLogger(__name__)


class Place(msgspec.Struct, frozen=True):
    """Where a rank is."""

    host: str
    gpu: str


class Inbox(msgspec.Struct, frozen=True):
    """A rank's inbox. handle: empty where there is none, for that reason."""

    handle: bytes = b""
    reason: str = ""


Told = TypeVar("Told", Place, Inbox)


def hindrance(places: Sequence[Place]) -> str:
    """Why these ranks, in rank order, cannot be peers; empty if they may try."""
    if len(places) not in LIMITS:
        return f"{len(places)} ranks are none of {sorted(LIMITS)}"
    if len(hosts := {place.host for place in places}) > 1:
        return f"they are on {len(hosts)} hosts"
    return "some share a GPU" if len({place.gpu for place in places}) < len(places) else ""


class Peers:
    """One rank's side. Between `join` and `leave` it may have a mailbox; without one it `takes` nothing."""

    def __init__(self, rank: int, size: int, device: torch.device) -> None:
        self._rank = rank
        self._size = size
        self._inbox: SharedMemory | None = None
        self._blank = blank(rank, size, LIMITS.get(size, 0), device)
        self._stop = self._blank.stop.numpy()  # to be written by any thread
        self._mapped: dict[int, int] = {}  # rank -> address
        self._mailbox: Mailbox | None = None

    def join(self, store: Store, agree: Callable[[bool], bool]) -> None:
        """Map the inboxes of the others of this epoch, whose store it is; no rank of another one may still be running.

        agree: whether it is so on all ranks; it waits for them. `stop` is as it was: False, after `leave`, is the
        caller's to say.
        """
        assert not self._mapped, "one epoch is left before the next is joined"
        self._blank.counts.zero_()
        self._blank.halted.zero_()
        reason = hindrance(self._tell(store, Place(_host(), _gpu())))
        if not reason:  # on no rank
            reason = self._map(self._tell(store, self._empty_inbox()))
        if not agree(not reason):
            self.leave()
            _log.info("sums over ranks: all by NCCL, for %s", reason or "another rank could not map the others' memory")
            return
        assert self._inbox is not None
        addresses = [self._mapped.get(rank, 0) for rank in range(self._size)]
        self._blank.inboxes.copy_(torch.tensor(addresses))
        self._mailbox = replace(self._blank, inbox=self._inbox.tensor)
        _log.info("sums over ranks: up to bytes=%d in each other's memory, larger ones by NCCL", LIMITS[self._size])

    def leave(self) -> None:
        """Use the others' memory no more, whether they live or not. What still waits for them ends, with results that
        mean nothing. Idempotent."""
        self._mailbox = None
        if not self._mapped:
            return
        self.stop(True)
        torch.cuda.synchronize()  # no kernel may write into what is unmapped
        while self._mapped:
            rank, address = self._mapped.popitem()
            try:
                close_handle(address)
            except DriverError as error:
                _log.warning("the memory of rank=%d stays mapped: %s", rank, error)

    def stop(self, stopped: bool) -> None:
        """From any thread: whether exchanges end without what they wait for."""
        self._stop[0] = stopped

    def takes(self, x: torch.Tensor, *, summed: bool) -> bool:
        """Whether this tensor goes this way; all ranks answer alike."""
        return self._mailbox is not None and fits(x, self._mailbox.max_bytes, summed=summed)

    def add_up(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """The ranks' x added up in rank order, and the residual to that; x is overwritten."""
        assert self._mailbox is not None
        return ops.add_up_peers(self._mailbox, x, residual)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """Every rank's x stacked in rank order: [size, *x.shape]."""
        assert self._mailbox is not None
        return ops.gather_peers(self._mailbox, x)

    def _tell(self, store: Store, mine: Told) -> list[Told]:
        """What each rank says of itself, in rank order."""
        kind = type(mine)
        store.set(f"{kind.__name__}-{self._rank}", msgspec.msgpack.encode(mine))  # type: ignore[arg-type]
        said = [store.get(f"{kind.__name__}-{rank}") for rank in range(self._size)]
        return [msgspec.msgpack.decode(one, type=kind) for one in said]

    def _empty_inbox(self) -> Inbox:
        """This rank's."""
        try:
            if self._inbox is None:
                self._inbox = SharedMemory(*inbox_shape(self._size, LIMITS[self._size]))
            self._inbox.tensor.zero_()
            torch.cuda.synchronize()  # before any rank can know the handle
            return Inbox(self._inbox.handle())
        except DriverError as error:
            return Inbox(reason=str(error))

    def _map(self, inboxes: Sequence[Inbox]) -> str:
        """Map the others' inboxes; why not, if so."""
        if missing := [f"rank {rank}: {inbox.reason}" for rank, inbox in enumerate(inboxes) if not inbox.handle]:
            return "; ".join(missing)
        try:
            for rank, inbox in enumerate(inboxes):
                if rank != self._rank:
                    self._mapped[rank] = open_handle(inbox.handle)
        except DriverError as error:
            return str(error)
        return ""


def compile_exchange(size: int, x: torch.Tensor, residual: torch.Tensor | None = None, *, summed: bool = True) -> None:
    """Compile what peers launch for such tensors, where they are so many and take them; nothing runs."""
    limit = LIMITS.get(size, 0)
    if x.is_cuda and fits(x, limit, summed=summed):
        ops.compile_exchange(blank(0, size, limit, x.device), x, residual, summed=summed)


def _gpu() -> str:
    """The GPU's uuid."""
    return str(torch.cuda.get_device_properties(0).uuid)


def _host() -> str:
    """The machine, whatever container this is in: its boot. Without Linux, its name."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
