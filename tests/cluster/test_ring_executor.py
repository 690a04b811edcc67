"""RingExecutor and the ranks' loop between plain processes, without Ray: order, failures, deaths, hangs, epochs."""

from __future__ import annotations

import itertools
import multiprocessing as mp
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

import pytest

from tests.cluster.processes import until
from tpqwen.errors import ConfigError, RankDied
from tpqwen.executor import processes, ranks
from tpqwen.executor.rank import serve_steps
from tpqwen.executor.ranks import RingExecutor
from tpqwen.executor.wiring import Hub, interface_address, join
from tpqwen.step import Capacity, Chunk, StepInput, StepOutput, ints, packed

CAPACITY = Capacity(num_blocks=8, block_size=4, max_num_seqs=4, max_model_len=32, max_batched_tokens=32)
EPOCH = 5
FAIL_TOKEN, HANG_TOKEN, BLOCK_TOKEN = 777, 888, 999


class SummingWorker:
    """Answers each step with the sum of its chunk's tokens; special tokens make one rank fail, hang
    computing, or all of them block without using a CPU."""

    def __init__(self, rank: int, culprit: int) -> None:
        self._pending: deque[StepInput] = deque()
        self._am_culprit = rank == culprit

    def submit(self, step: StepInput) -> None:
        tokens = ints(step.chunks[0].token_ids)
        if self._am_culprit and FAIL_TOKEN in tokens:
            raise KeyError("layer 3")
        if BLOCK_TOKEN in tokens:
            threading.Event().wait()
        self._pending.append(step)

    def ready(self) -> bool:
        return not (self._am_culprit and HANG_TOKEN in ints(self._pending[0].chunks[0].token_ids))

    def collect(self) -> StepOutput:
        step = self._pending.popleft()
        return StepOutput(step.epoch, step.step, packed([int(ints(step.chunks[0].token_ids).sum())]))


def run_rank(rank: int, culprit: int, pipe: Connection) -> None:
    inbox, outbox, answers = join(pipe.recv(), epoch=EPOCH)
    pipe.send(answers)
    serve_steps(SummingWorker(rank, culprit), inbox, outbox, epoch=EPOCH, answers=rank == 0)
    pipe.send("ended")


class Group:
    """Two or more rank processes and the executor over them."""

    def __init__(self, hosts: list[str], culprit: int, idle_is_hung: bool = False) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["pytest", "tpqwen.executor.rank", "tpqwen.executor.ranks"])
        hub = Hub(hosts, "here", epoch=EPOCH)
        self.pipes = []
        self.processes = []
        for rank in range(len(hosts)):
            ours, theirs = context.Pipe()
            process = context.Process(target=run_rank, args=(rank, culprit, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        for pipe, address in zip(self.pipes, hub.addresses, strict=True):
            pipe.send(address)
        streams: list[Any] = []
        remote = [r for r, host in enumerate(hosts) if host != "here"]
        answers = [None if r in remote else self.heard(r) for r in range(len(hosts))]
        streams.append(hub.connect(answers))
        for rank in remote:
            assert self.heard(rank) is None
        self.executor = RingExecutor(CAPACITY, streams[0], depth=2, epoch=EPOCH, idle_is_hung=idle_is_hung)

    def heard(self, rank: int) -> Any:
        assert self.pipes[rank].poll(20), f"rank {rank} says nothing"
        return self.pipes[rank].recv()

    def end(self) -> None:
        self.executor.stop()
        for process, pipe in zip(self.processes, self.pipes, strict=True):
            process.kill()
            process.join(10)
            process.close()
            pipe.close()


@pytest.fixture
def start() -> Iterator[Callable[..., Group]]:
    groups: list[Group] = []

    def begin(*hosts: str, culprit: int = -1, idle_is_hung: bool = False) -> Group:
        groups.append(Group(list(hosts), culprit, idle_is_hung))
        return groups[-1]

    yield begin
    for group in groups:
        group.end()


def step(number: int, tokens: list[int], epoch: int = EPOCH) -> StepInput:
    return StepInput(epoch, number, (), b"", (Chunk(0, 0, packed(tokens), True),), None)


def step_until_failure(executor: RingExecutor) -> None:
    """A rank other than 0 is heard when rank 0 has nothing to say, or when its end shows."""
    until = time.monotonic() + 10
    for number in itertools.count(1):
        executor.collect(3)
        executor.submit(step(number, [1]))
        assert time.monotonic() < until


def total(output: StepOutput) -> int:
    return int(ints(output.tokens)[0])


@pytest.mark.parametrize("hosts", [("here", "here"), ("here", "there", "here"), ("there", "here")])
def test_steps_come_back_in_order_with_two_in_flight_on_one_node_and_beyond(start, hosts):
    group = start(*hosts)
    executor = group.executor
    assert executor.start() == CAPACITY
    executor.submit(step(0, [0]))
    for number in range(1, 200):
        executor.submit(step(number, [number, 1]))
        output = executor.collect(10)
        assert (output.step, total(output)) == (number - 1, number - 1 + (number > 1))
    assert executor.collect(10).step == 199
    executor.stop()
    assert [group.heard(r) for r in range(len(hosts))] == ["ended"] * len(hosts)


def test_a_prefill_of_two_hundred_thousand_tokens_passes(start):
    executor = start("here", "there").executor
    executor.submit(step(0, [1] * 200_000))
    assert total(executor.collect(20)) == 200_000


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_rank_that_fails_is_named_with_its_words(start, culprit):
    executor = start("here", "here", culprit=culprit).executor
    executor.submit(step(0, [FAIL_TOKEN if culprit == 0 else HANG_TOKEN, FAIL_TOKEN]))
    with pytest.raises(RankDied, match=rf"rank {culprit} (failed|died): KeyError: 'layer 3'") as caught:
        step_until_failure(executor)
    assert caught.value.rank == culprit


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_named_within_a_second(start, victim):
    group = start("here", "here", culprit=0)
    group.executor.submit(step(0, [HANG_TOKEN]))
    timer = threading.Timer(0.1, os.kill, (group.processes[victim].pid, signal.SIGKILL))
    timer.start()
    begin = time.monotonic()
    with pytest.raises(RankDied, match=f"rank {victim} died") as caught:
        group.executor.collect(30)
    assert caught.value.rank == victim
    assert time.monotonic() - begin < 1.1
    with pytest.raises(RankDied):
        group.executor.submit(step(1, [1]))
    timer.join()


def test_a_stopped_rank_is_named_at_the_deadline(start):
    group = start("here", "here", culprit=0)
    os.kill(group.processes[1].pid, signal.SIGSTOP)
    group.executor.submit(step(0, [HANG_TOKEN]))
    with pytest.raises(RankDied, match="rank 1 did not take the step") as caught:
        group.executor.collect(0.5)
    assert caught.value.rank == 1


def test_a_hung_collective_is_told_from_a_stopped_rank(start):
    group = start("here", "here", culprit=0)
    group.executor.submit(step(0, [HANG_TOKEN]))
    with pytest.raises(RankDied, match="all ranks took the step"):
        group.executor.collect(0.5)


def test_ranks_that_use_no_cpu_hang_which_is_known_long_before_the_deadline(start):
    executor = start("here", "here", idle_is_hung=True).executor
    executor.submit(step(0, [BLOCK_TOKEN]))
    begin = time.monotonic()
    with pytest.raises(RankDied, match="no rank has computed") as caught:
        executor.collect(60)
    assert caught.value.rank is None
    assert time.monotonic() - begin < 3


@pytest.mark.parametrize(("hosts", "token"), [(("here", "here"), HANG_TOKEN), (("here", "there"), BLOCK_TOKEN)])
def test_ranks_that_compute_or_are_elsewhere_have_until_the_deadline(start, hosts, token):
    executor = start(*hosts, culprit=0, idle_is_hung=True).executor
    executor.submit(step(0, [token]))
    with pytest.raises(RankDied, match="no answer within 2 s"):
        executor.collect(2)


def test_a_pause_of_the_whole_machine_or_a_want_of_cpu_is_no_idleness(monkeypatch):
    now, used, starved = 100.0, 5.0, False
    monkeypatch.setattr(ranks, "time", SimpleNamespace(monotonic=lambda: now))
    looks = SimpleNamespace(cpu_s=lambda pid: used, wants_cpu=lambda pid: starved and pid == 2)
    monkeypatch.setattr(ranks, "processes", looks)
    watch = ranks.WorkWatch([1, 2])
    watch.begin()
    assert watch.idle_s() == 0.0
    now += 3600
    assert watch.idle_s() < ranks.STALL_S
    now, used = now + 0.25, used + 0.02
    assert watch.idle_s() == 0.0, "and on it goes"
    for _ in range(5):
        now += 0.25
        watch.idle_s()
    assert watch.idle_s() == 1.25
    starved = True
    for _ in range(5):
        now += 0.25
        watch.idle_s()
    assert watch.idle_s() == 1.25


def test_a_process_that_computes_is_told_from_one_that_sleeps():
    spins, sleeps = (
        subprocess.Popen([sys.executable, "-c", code]) for code in ("while True: 1", "import time; time.sleep(60)")
    )
    try:
        until(lambda: (processes.cpu_s(spins.pid) or 0) > 0.1 and processes.wants_cpu(spins.pid), "some work")
        until(lambda: not processes.wants_cpu(sleeps.pid), "rest")
    finally:
        for process in (spins, sleeps):
            process.kill()
            process.wait()
    assert processes.cpu_s(spins.pid) is None and not processes.wants_cpu(spins.pid)


def test_a_stopped_rank_is_named_before_a_long_deadline(start):
    group = start("here", "here", culprit=0)
    os.kill(group.processes[1].pid, signal.SIGSTOP)
    group.executor.submit(step(0, [HANG_TOKEN]))
    begin = time.monotonic()
    with pytest.raises(RankDied, match="rank 1 did not take the step"):
        group.executor.collect(60)
    assert time.monotonic() - begin < 5


def test_a_remote_rank_that_goes_is_noticed(start):
    group = start("here", "there", culprit=0)
    group.executor.submit(step(0, [HANG_TOKEN]))
    group.processes[1].kill()
    with pytest.raises(RankDied, match="rank 1 has ended"):
        group.executor.collect(20)


def test_steps_of_another_epoch_are_refused(start):
    executor = start("here").executor
    executor.submit(step(0, [1], epoch=EPOCH - 1))
    executor.submit(step(1, [2]))
    assert executor.collect(10).step == 1


def test_an_unknown_interface_is_refused_by_name():
    assert interface_address(None) == "127.0.0.1"
    assert interface_address("lo") == "127.0.0.1"
    with pytest.raises(ConfigError, match="nosuch0"):
        interface_address("nosuch0")
