"""RankGroup over actors that are no processes: who is ended, in which order, and what successors wait for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tpqwen import recovery
from tpqwen.config import Config
from tpqwen.errors import RankDied
from tpqwen.executor import rank_group
from tpqwen.executor.rank_group import RankGroup
from tpqwen.executor.rank_process import Where
from tpqwen.recovery import Supervisor
from tpqwen.step import Capacity

CAPACITY = Capacity(num_blocks=8, block_size=4, max_num_seqs=4, max_model_len=32, max_batched_tokens=32)


PENDING = object()


class FakeActor:
    """Answers at once, but for what the ray of the test says about leaving."""

    def __init__(self, ray: FakeRay, node: str, rank: int | None) -> None:
        self.rank = rank
        self.gpus = "" if rank is None else f"gpu {rank}"
        self.ray, self.node, self.loaded = ray, node, (0,)
        self.pid = ray.new_pid()

    def __getattr__(self, method: str) -> Any:
        answers: dict[str, Callable[..., Any]] = {
            "where": lambda: Where(self.node, self.pid, self.gpus),
            "become": self._become,
            "load": self._load,
            "leave": lambda timeout_s, hung: self.ray.leave(self.pid),
            "join": lambda meeting: None,
        }
        return SimpleNamespace(remote=lambda *args: Call(lambda: answers[method](*args)))

    def _become(self, options: dict[str, Any], rank: int, gpus: str) -> Where:
        self.rank, self.gpus = rank, gpus
        return Where(self.node, self.pid, gpus)

    def _load(self, folder: str, meeting: Any, ended: tuple[int, ...] = ()) -> Capacity:
        self.loaded = ended
        return CAPACITY


class Call:
    """What a remote method returns. answer() is PENDING while there is no answer yet."""

    def __init__(self, answer: Callable[[], Any]) -> None:
        self.answer = answer


class FakeRay:
    """The part of Ray that RankGroup uses. can_leave: for each process, whether it leaves, or PENDING."""

    def __init__(self, nodes: list[str]) -> None:
        self.nodes = nodes
        self.spawned = 0
        self.pids = 100
        self.killed: list[int] = []
        self.stopped: list[int] = []
        self.can_leave: dict[int, Callable[[], Any]] = {}

    def new_pid(self) -> int:
        self.pids += 1
        return self.pids

    def leave(self, pid: int) -> Any:
        return self.can_leave.get(pid, lambda: True)()

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(get_node_id=lambda: "a")

    def remote(self, _: Any) -> Any:
        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self._spawn))

    def _spawn(self, options: dict[str, Any], rank: int | None) -> FakeActor:
        return FakeActor(self, "a" if rank is None else self.nodes[rank], rank)

    def wait(self, calls: list[Call], num_returns: int, timeout: float) -> tuple[list[Call], list[Call]]:
        ready = [c for c in calls if c.answer() is not PENDING][:num_returns]
        return ready, [c for c in calls if c not in ready]

    def get(self, call: Call) -> Any:
        return call.answer()

    def kill(self, actor: FakeActor, no_restart: bool) -> None:
        self.killed.append(actor.pid)


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[FakeRay, RankGroup]]:
    def begin(*nodes: str, **options: Any) -> tuple[FakeRay, RankGroup]:
        ray = FakeRay(list(nodes))
        monkeypatch.setattr(rank_group, "ray", ray)
        monkeypatch.setattr(rank_group, "NodeAffinitySchedulingStrategy", lambda *_, **__: None)
        monkeypatch.setattr(rank_group, "_kill_on", lambda node, pid: None)
        monkeypatch.setattr(rank_group.processes, "kill", lambda pid, _: ray.killed.append(pid))
        monkeypatch.setattr(rank_group.processes, "is_gone", ray.killed.__contains__)
        monkeypatch.setattr(rank_group.processes, "is_stopped", ray.stopped.__contains__)
        monkeypatch.setattr(rank_group, "LEAVE_TIMEOUT_S", 0.0)
        monkeypatch.setattr(rank_group, "ANSWER_S", 0.2)
        group = RankGroup(Config.load({"tp": len(nodes), "device": "cpu"} | options, {}), Path("model"))
        group.load()
        group.keep_spare()
        return ray, group

    return begin


def test_successors_wait_for_all_processes_of_their_node_that_were_replaced(start) -> None:
    _, group = start("a", "a", "b", "b")
    old = group.pids()
    assert group.repair([0, 1, 2]).replaced == [0, 1, 2]
    assert [actor.loaded for actor in group.actors[:3]] == [(old[0], old[1])] * 2 + [(old[2],)]
    first = group.pids()[0]
    group.repair([0])
    assert group.actors[0].loaded == (first,), "of the repair before nobody is left"


def test_the_rank_that_hangs_is_ended_at_once_which_releases_those_that_wait_for_it(start) -> None:
    ray, group = start("a", "a", "a", "a")
    zero, one, two, three = group.pids()
    ray.can_leave = {one: lambda: False}
    for waiting in (zero, two, three):  # they answer only once rank 1 is gone
        ray.can_leave[waiting] = lambda: True if one in ray.killed else PENDING
    assert group.repair(hung=True).replaced == [1]
    assert set(ray.killed) == {one}
    assert [p for p in group.pids() if p in (zero, two, three)] == [zero, two, three]


def test_who_does_not_answer_in_time_is_replaced_too(start) -> None:
    ray, group = start("a", "a")
    ray.can_leave = {group.pids()[0]: lambda: PENDING}
    assert group.repair([1]).replaced == [0, 1]


def test_a_spare_takes_the_first_lost_place_with_its_gpus_and_is_replaced(start) -> None:
    ray, group = start("a", "a", warm_spare=True)
    spare = group._spare[0]
    assert spare.rank is None
    group.repair([0, 1])
    assert group.actors[0] is spare and (spare.rank, spare.gpus) == (0, "gpu 0")
    assert group.actors[1].rank == 1 and group._spare is None
    group.keep_spare()
    after = group._spare[0]
    assert after.rank is None and after is not spare
    group.stop()
    assert {spare.pid, after.pid} <= set(ray.killed)
    assert group._spare is None


@pytest.mark.parametrize("state", ["killed", "stopped"])
def test_a_spare_that_is_of_no_use_is_not_used(start, state) -> None:
    ray, group = start("a", "a", warm_spare=True)
    spare = group._spare[0]
    getattr(ray, state).append(spare.pid)
    assert group.repair([1]).replaced == [1]
    assert group.actors[1] is not spare and spare.pid in ray.killed
    assert group._spare is None


def test_a_spare_replaces_nobody_on_another_node(start) -> None:
    _, group = start("a", "b", warm_spare=True)
    spare = group._spare[0]
    group.repair([1])
    assert group.actors[1].node == "b" and group._spare[0] is spare


def test_a_group_waits_for_the_memory_of_one_that_did_not_start(start):
    """On the nodes where it is, and until it has loaded; whoever stops it learns which processes were ended."""
    _, group = start("a", "b")
    ended = group.stop()
    assert ended == {("a", 101), ("b", 102)}
    again = RankGroup(group.config, Path("model"), ended=ended)
    again.load()
    assert [actor.loaded for actor in again.actors] == [(101,), (102,)]
    again.repair([1])
    assert again.actors[1].loaded == (104,)


def test_each_attempt_to_start_is_told_of_the_ranks_of_those_before(monkeypatch):
    told: list[set[tuple[str, int]]] = []

    class FailingGroup:
        def __init__(self, *args: Any) -> None:
            told.append(set(args[-1]))

        def load(self) -> Capacity:
            raise RankDied("rank 0 died", rank=0)

        def stop(self) -> set[tuple[str, int]]:
            return {("a", len(told))}

    monkeypatch.setattr(recovery, "RankGroup", FailingGroup)
    monkeypatch.setattr(recovery, "ray", SimpleNamespace(kill=lambda *_, **__: None))
    monkeypatch.setattr(Supervisor, "_new_engine", lambda _: object())

    async def main() -> None:
        supervisor = Supervisor(Config.load({"device": "cpu"}, {}), Path("model"), SimpleNamespace())
        with pytest.raises(RankDied):
            await supervisor.start()
        await supervisor.stop()

    asyncio.run(main())
    assert told == [set(), {("a", 1)}, {("a", 1), ("a", 2)}]
