"""Ranks as peers: who may be, that all agree, and that nothing of one epoch is left in the next."""

from __future__ import annotations

import itertools
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._C._distributed_c10d import HashStore, TCPStore
from torch.distributed.distributed_c10d import PrefixStore

from tpqwen.parallel import peers
from tpqwen.parallel.device_memory import DriverError
from tpqwen.parallel.group import TPGroup
from tpqwen.parallel.peers import LIMITS, Peers, Place, hindrance

CPU = torch.device("cpu")
GPU_TEST_S = 120


def places(hosts: str, gpus: str) -> list[Place]:
    return [Place(host, gpu) for host, gpu in zip(hosts, gpus, strict=True)]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (places("aa", "xy"), ""),
        (places("aaaaaaaa", "12345678"), ""),
        (places("ab", "xy"), "2 hosts"),
        (places("aa", "xx"), "share a GPU"),
        (places("aaa", "xyz"), "3 ranks"),
    ],
)
def test_peers_are_2_4_or_8_ranks_of_one_host_on_a_gpu_each(given: list[Place], reason: str) -> None:
    assert reason in hindrance(given) and bool(reason) == bool(hindrance(given))


class Driver:
    """What the CUDA driver would be asked, on one address space: memory, mappings, and which of them fail."""

    def __init__(self) -> None:
        self.memory: dict[bytes, torch.Tensor] = {}
        self.opened: list[int] = []
        self.closed_at = 0  # the how many-th memory cannot be mapped
        self.full_at = 0  # or cannot be had
        self._asked = itertools.count(1)
        self.unclosable: set[int] = set()

    def share(self, *shape: int) -> Any:
        if next(self._asked) == self.full_at:
            raise DriverError("cuMemAlloc_v2: CUDA_ERROR_OUT_OF_MEMORY")
        tensor = torch.zeros(shape, dtype=torch.int64)
        handle = tensor.data_ptr().to_bytes(64, "little")
        self.memory[handle] = tensor
        return SimpleNamespace(tensor=tensor, handle=lambda: handle)

    def open(self, handle: bytes) -> int:
        if handle in list(self.memory)[self.closed_at - 1 : self.closed_at]:
            raise DriverError("cuIpcOpenMemHandle_v2: CUDA_ERROR_PEER_ACCESS_UNSUPPORTED")
        self.opened.append(self.memory[handle].data_ptr())
        return self.opened[-1]

    def close(self, address: int) -> None:
        self.opened.remove(address)
        if address in self.unclosable:
            raise DriverError("cuIpcCloseMemHandle: CUDA_ERROR_INVALID_VALUE")


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    fake = Driver()
    monkeypatch.setattr(peers, "SharedMemory", fake.share)
    monkeypatch.setattr(peers, "open_handle", fake.open)
    monkeypatch.setattr(peers, "close_handle", fake.close)
    monkeypatch.setattr(peers, "_gpu", iter("uvwxyz").__next__)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    yield fake
    assert not fake.opened, "left mapped"


def join(ranks: list[Peers], epoch: int, store: Any) -> list[bool]:
    """All join, each in a thread; whether each one says that it can."""
    said: dict[int, bool] = {}
    votes = PrefixStore(f"votes-{epoch}", store)

    def one(rank: int) -> None:
        def agree(mine: bool) -> bool:
            said[rank] = mine
            votes.set(str(rank), str(int(mine)))
            return all(votes.get(str(r)) == b"1" for r in range(len(ranks)))

        ranks[rank].join(PrefixStore(f"epoch-{epoch}", store), agree)

    with ThreadPoolExecutor(len(ranks)) as threads:
        list(threads.map(one, range(len(ranks))))
    return [said[rank] for rank in range(len(ranks))]


def store() -> Any:
    made = HashStore()
    made.set_timeout(timedelta(seconds=30))
    return made


def test_peers_take_small_tensors_from_joining_to_leaving(driver: Driver) -> None:
    ranks, here = [Peers(rank, 2, CPU) for rank in range(2)], store()
    small, large = torch.ones(8, 64, dtype=torch.bfloat16), torch.ones(LIMITS[2] // 4 + 1)
    assert not ranks[0].takes(small, summed=True)
    assert join(ranks, 1, here) == [True, True]
    for rank in ranks:
        assert rank.takes(small, summed=True) and not rank.takes(large, summed=True)
        assert rank.takes(small.double(), summed=False) and not rank.takes(small.double(), summed=True)
        assert not rank.takes(torch.ones(3, dtype=torch.bool), summed=False), "no whole words"
    assert len(driver.opened) == 2
    for _ in range(2):
        ranks[0].leave()
        assert not ranks[0].takes(small, summed=True) and len(driver.opened) == 1
    ranks[1].leave()


def test_an_epoch_begins_with_an_empty_inbox_and_the_same_memory(driver: Driver) -> None:
    ranks, here = [Peers(rank, 2, CPU) for rank in range(2)], store()
    join(ranks, 1, here)
    for tensor in driver.memory.values():
        tensor.fill_(7)
    for rank in ranks:
        rank._blank.counts.fill_(7)
        rank._blank.halted.fill_(1)
        rank.leave()
        assert rank._blank.stop.item() == 1, "what waits for others ends"
    ranks[0].stop(False)
    ranks[1] = Peers(1, 2, CPU)  # in a process of its own
    assert join(ranks, 2, here) == [True, True]
    assert len(driver.memory) == 3, "rank 0 keeps its memory"
    for rank in ranks:
        box = rank._mailbox
        assert box is not None and not box.inbox.any() and not box.counts.any() and not box.stop.any()
        assert not box.halted.any()
        other = ranks[1 - box.rank]._mailbox
        assert other is not None and box.inboxes[1 - box.rank] == other.inbox.data_ptr()
    for rank in ranks:
        rank.leave()


def test_if_one_rank_cannot_map_the_others_memory_none_uses_it(driver: Driver) -> None:
    ranks, driver.closed_at = [Peers(rank, 4, CPU) for rank in range(4)], 3
    assert join(ranks, 1, store()).count(True) == 1, "the rank whose own it is"
    assert not any(rank.takes(torch.ones(8), summed=True) for rank in ranks)


def test_ranks_that_share_a_gpu_share_no_memory(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_gpu", lambda: "the one")
    ranks = [Peers(rank, 2, CPU) for rank in range(2)]
    assert join(ranks, 1, store()) == [False, False]
    assert not any(rank.takes(torch.ones(8), summed=True) for rank in ranks)
    assert not driver.memory


def test_a_rank_without_memory_leaves_all_without(driver: Driver, caplog: pytest.LogCaptureFixture) -> None:
    driver.full_at = 2
    ranks = [Peers(rank, 2, CPU) for rank in range(2)]
    with caplog.at_level(logging.INFO):
        assert join(ranks, 1, store()) == [False, False]
    assert all("CUDA_ERROR_OUT_OF_MEMORY" in message for message in caplog.messages)
    assert not any(rank.takes(torch.ones(8), summed=True) for rank in ranks)


def test_a_mapping_that_does_not_close_holds_nobody_up(driver: Driver) -> None:
    ranks = [Peers(rank, 2, CPU) for rank in range(2)]
    join(ranks, 1, store())
    driver.unclosable.update(driver.opened)
    for rank in ranks:
        rank.leave()


def test_calling_a_rank_off_stops_what_waits_for_its_peers() -> None:
    group = TPGroup(0, 2, None)
    group.called_off = True
    group._peers = Peers(0, 2, CPU)
    for called_off in (True, False):
        group.called_off = called_off
        assert group.called_off == called_off == bool(group._peers._blank.stop.item())


def test_a_device_that_has_only_stopped_waiting_has_not_passed() -> None:
    group = TPGroup(0, 2, None)

    def passed() -> bool:
        group.called_off = True
        return True

    with pytest.raises(ConnectionError):
        group.wait_until(passed)


class Taking:
    """Stands for Peers: takes no more than 64 bytes."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def takes(self, x: torch.Tensor, *, summed: bool) -> bool:
        return x.nbytes <= 64

    def add_up(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        self.asked.append("sum" if residual is None else "sum and residual")
        return x

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        self.asked.append("gather")
        return x[None]

    def stop(self, stopped: bool) -> None:
        self.asked.append("stop")


def test_a_group_sends_small_tensors_to_peers_and_large_ones_through_the_library(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    group, taking, others = TPGroup(0, 2, None), Taking(), []
    group._peers = taking  # type: ignore[assignment]
    monkeypatch.setattr(group, "_together", lambda collective, *tensors: others.append(len(tensors[-1])))
    for ordered in (False, True):
        for x in (torch.ones(16), torch.ones(17)):
            group.add_reduced(x, x, ordered=ordered)
            group.all_reduce(x)
            group.all_gather(x)
    assert taking.asked == ["sum and residual", "sum", "gather"] * 2
    assert others == [17] * 6
    group.called_off = True
    assert taking.asked.pop() == "stop"
    for call in (lambda x: group.add_reduced(x, x), group.all_reduce, group.all_gather):
        with pytest.raises(ConnectionError):
            call(torch.ones(16))


def spawn(rank: int, port: int, epoch: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.device.peer_rank", str(rank), "2", str(port), str(epoch)]
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
    return subprocess.Popen(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": given[rank]})


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs are needed")
def test_two_gpus_exchange_and_one_survives_the_other() -> None:
    owner = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [spawn(rank, owner.port, 1) for rank in range(2)]
    try:
        assert ranks[1].wait(GPU_TEST_S) == -signal.SIGKILL
        ranks[1] = spawn(1, owner.port, 2)
        assert [rank.wait(GPU_TEST_S) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
