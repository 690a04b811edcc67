"""The owner's side of all ranks: it places them as Ray actors, and replaces those that die under the others.

The owner (a Serve replica, or the process of the offline API) holds the rendezvous and the actors; the engine only gets
channel addresses, so it may live in another process and be replaced without the ranks. No step passes through Ray.
"""

from __future__ import annotations

import logging
import secrets
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from tpqwen.config import Config, resolve_device
from tpqwen.errors import ConfigError, RankDied
from tpqwen.executor import processes
from tpqwen.executor.rank_process import Meeting, RankProcess, Refusal, Where
from tpqwen.executor.wiring import Plain, interface_address
from tpqwen.step import Capacity, RankStats

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

STORE = "torch._C._distributed_c10d"  # imported when there are ranks that have to meet
START_TIMEOUT_S = 180.0  # of a process that imports torch
LOAD_TIMEOUT_S = 1800.0
JOIN_TIMEOUT_S = 120.0
REJOIN_TIMEOUT_S = 30.0  # everybody has loaded by then
CALL_TIMEOUT_S = 60.0
LEAVE_TIMEOUT_S = 2.0  # for a survivor to end its step and its communicator; else it is replaced too
ANSWER_S = 1.0  # more, for the call itself
KILL_TIMEOUT_S = 10.0
REMOTE_KILL_TIMEOUT_S = 5.0  # a node that does not answer by then is cut off, and fenced by epoch and secret

Process = tuple[str, int]  # Ray node and process id

_log = logging.getLogger(__name__)


@dataclass
class Repair:
    """What one repair took: the ranks that were replaced, and seconds by stage (part, start, load, rejoin)."""

    replaced: list[int] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


class RankGroup:
    """placement: bundles [first_bundle ..] take one rank each; None places freely. ended: processes of a group before
    this one, which may still hold GPU memory.

    epoch counts the groups that were formed of these ranks; channels, steps and rendezvous of another one are refused.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        placement: PlacementGroup | None = None,
        first_bundle: int = 0,
        ended: Iterable[Process] = (),
    ) -> None:
        self.config = config
        self.epoch = 1
        self.capacity: Capacity | None = None
        self._folder = folder
        self._placement = placement
        self._first_bundle = first_bundle
        self._store: TCPStore | None = None
        self._here = str(ray.get_runtime_context().get_node_id())
        self.actors: list[Any] = [self._spawn(rank) for rank in range(config.parallel.tp)]
        self._where: list[Where | None] = [None] * config.parallel.tp  # once known
        self._spare: tuple[Any, Any] | None = None  # for the next rank that is lost: actor, and the call for its Where
        self._ended: set[Process] = set(ended)  # those replaced since the last whole group

    def load(self) -> Capacity:
        """Load all ranks side by side; what they can hold together. Raises ConfigError or RankDied."""
        calls = [actor.where.remote() for actor in self.actors]
        if len(calls) > 1:
            import_module(STORE)  # while they import it too
        self._where = list(self._all(calls, START_TIMEOUT_S))
        meeting = self._meeting(JOIN_TIMEOUT_S)
        folder, nodes = str(self._folder), self.nodes()
        calls = [a.load.remote(folder, meeting, self._ended_on(n)) for a, n in zip(self.actors, nodes, strict=True)]
        capacities: list[Capacity] = self._all(calls, LOAD_TIMEOUT_S)
        self._ended.clear()
        least = min(capacities, key=lambda c: c.num_blocks)
        slowest = max(capacities, key=lambda c: sum(c.load_seconds.values()))
        self.capacity = msgspec.structs.replace(least, load_seconds=slowest.load_seconds)
        return self.capacity

    def repair(self, suspects: Iterable[int] = (), *, hung: bool = False) -> Repair:
        """Replace the suspects, and whoever else does not leave the old group in time; form the next epoch's group.

        hung: some rank does not go on, and which one it is shows when all are asked to leave. Survivors keep their
        weights, everybody forgets the cache. Call it after `load`; then `connect`. Raises ConfigError when the
        checkpoint cannot be read again, RankDied when another rank dies meanwhile: call it again.
        """
        done, mark = Repair(), time.monotonic()

        def stage(name: str) -> None:
            nonlocal mark
            now = time.monotonic()
            done.seconds[name] = now - mark
            mark = now

        self.epoch += 1
        self._store = None
        done.replaced = self._part(set(suspects), hung)
        stage("part")
        found = self._all([self._replace(rank) for rank in done.replaced], START_TIMEOUT_S, done.replaced)
        for rank, where in zip(done.replaced, found, strict=True):
            self._where[rank] = where
        stage("start")
        folder = str(self._folder)
        calls = [
            self.actors[rank].load.remote(folder, None, self._ended_on(where.node))
            for rank, where in zip(done.replaced, found, strict=True)
        ]
        self._all(calls, LOAD_TIMEOUT_S, done.replaced)
        stage("load")
        meeting = self._meeting(REJOIN_TIMEOUT_S)
        self._all([actor.join.remote(meeting) for actor in self.actors], 2 * REJOIN_TIMEOUT_S)
        self._ended.clear()
        stage("rejoin")
        return done

    def keep_spare(self) -> None:
        """Have a spare process started, on this node and on no GPU, where one is wanted and there is none.

        Returns at once; call it when all is well, since its imports would slow a repair down. Ray does not count it
        on the GPU that it gets later, so that GPU has to be reserved: by the placement group.
        """
        if not self.config.parallel.warm_spare or self._spare is not None:
            return
        if self._placement is None and resolve_device(self.config.parallel.device) == "cuda":
            return
        options = {"num_cpus": 0, "num_gpus": 0, "max_restarts": 0, "max_task_retries": 0, "max_concurrency": 6}
        here = NodeAffinitySchedulingStrategy(self._here, soft=False)
        actor = ray.remote(RankProcess).options(scheduling_strategy=here, **options).remote(self._options(), None)
        self._spare = actor, actor.where.remote()

    def nodes(self) -> list[str]:
        """The Ray node of each rank."""
        return [where.node for where in self._where if where is not None]

    def pids(self) -> list[int]:
        """The process of each rank."""
        return [where.pid for where in self._where if where is not None]

    def local_pids(self) -> list[int]:
        """The processes of the ranks of this node."""
        return [where.pid for where in self._where if where is not None and where.node == self._here]

    def connect(self, addresses: list[Plain | None]) -> list[Plain | None]:
        """Give each rank the address of its steps; returns those of their answers."""
        calls = [a.connect.remote(p, self.epoch) for a, p in zip(self.actors, addresses, strict=True)]
        return list(self._all(calls, CALL_TIMEOUT_S))

    def peak_memory(self) -> list[int]:
        """Bytes of each rank's memory at most since this was last asked. Raises RankDied."""
        return list(self._all([a.peak_memory.remote() for a in self.actors], CALL_TIMEOUT_S))

    def stats(self, timeout_s: float = 1.0) -> list[RankStats]:
        """Slow numbers of the ranks that answer in time."""
        calls = [a.stats.remote() for a in self.actors]
        if not calls:
            return []
        ready, _ = ray.wait(calls, num_returns=len(calls), timeout=timeout_s)
        found = []
        for call in ready:
            try:
                found.append(ray.get(call, timeout=timeout_s))
            except RayError:
                continue
        return [s for s in found if s is not None]

    async def wait_for_end(self, rank: int) -> str | None:
        """Wait until the rank's process ends; why, or None when it was ended by us."""
        actor = self.actors[rank]
        try:
            await actor.wait.remote()
            reason = "its process was asked to end"
        except RayError as error:
            reason = first_line(error)
        return f"rank {rank} died: {reason}" if rank < len(self.actors) and self.actors[rank] is actor else None

    def stop(self) -> set[Process]:
        """Kill every rank; nothing of the group is left but, for a while, the memory of those returned. Idempotent."""
        ended = self._ended | {(where.node, where.pid) for where in self._where if where is not None}
        actors, self.actors = self.actors, []
        if self._spare is not None:
            actors.append(self._spare[0])
            self._spare = None
        for actor in actors:
            ray.kill(actor, no_restart=True)
        for pid in self.local_pids():
            if processes.is_stopped(pid):  # Ray's way takes seconds with these
                processes.kill(pid, 0.0)
        self._where = [None] * len(self._where)
        self._store = None
        return ended

    def _replace(self, rank: int) -> Any:
        """A process for the rank instead of its present one: the spare or a new one. Returns the call for its Where."""
        before, self._where[rank] = self._where[rank], None
        if before is not None and before.node == self._here and (spare := self._take_spare()) is not None:
            self.actors[rank] = spare
            return spare.become.remote(self._options(), rank, before.gpus)
        self.actors[rank] = self._spawn(rank)
        return self.actors[rank].where.remote()

    def _take_spare(self) -> Any:
        """The spare's actor, no longer spare; None when there is none that has started and goes on."""
        if self._spare is None or not ray.wait([self._spare[1]], num_returns=1, timeout=0)[0]:
            return None
        (actor, call), self._spare = self._spare, None
        try:
            pid = ray.get(call).pid
        except RayError:
            return None
        if processes.is_gone(pid) or processes.is_stopped(pid):
            ray.kill(actor, no_restart=True)
            processes.kill(pid, 0.0)
            return None
        return actor

    def _options(self) -> dict[str, Any]:
        """What a rank's process is told."""
        given = {k: v for k, v in self.config.flat().items() if v is not None}
        if self.capacity is not None:  # a successor's cache is as large as the others', without measuring
            given["num_kv_blocks"] = self.capacity.num_blocks - 1
        return given

    def _spawn(self, rank: int) -> Any:
        cuda = resolve_device(self.config.parallel.device) == "cuda"
        options: dict[str, Any] = {
            "num_cpus": 0,  # placement is by bundles; without them ranks share what there is
            "num_gpus": self.config.parallel.gpus_per_rank if cuda else 0,
            "max_restarts": 0,
            "max_task_retries": 0,
            "max_concurrency": 6,
        }
        if self._placement is not None:
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                self._placement, placement_group_bundle_index=self._first_bundle + rank
            )
        return ray.remote(RankProcess).options(**options).remote(self._options(), rank)

    def _part(self, suspects: set[int], hung: bool) -> list[int]:
        """End the suspects, let the others leave the old group, and end those that do not. Returns who is gone."""
        for rank in suspects:  # first: a stopped or spinning one holds its neighbours up
            self._kill(rank)
        others = [r for r in range(len(self.actors)) if r not in suspects]
        calls = {self.actors[r].leave.remote(LEAVE_TIMEOUT_S, hung): r for r in others}
        deadline = time.monotonic() + LEAVE_TIMEOUT_S + ANSWER_S
        while calls:
            ready, _ = ray.wait(list(calls), num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
            stuck = [rank for call in ready if not _left(rank := calls.pop(call), call)]
            if not ready:  # in time
                stuck, calls = list(calls.values()), {}
            for rank in stuck:  # at once: on a CPU its end is what releases those who wait for it
                self._kill(rank)
                suspects.add(rank)
        return sorted(suspects)

    def _kill(self, rank: int) -> None:
        """End the rank's process, on its node, and wait until it is gone."""
        if (where := self._where[rank]) is not None:
            node, pid, _ = where
            self._ended.add((node, pid))
            if node == self._here:
                processes.kill(pid, KILL_TIMEOUT_S)
            else:
                _kill_on(node, pid)
        ray.kill(self.actors[rank], no_restart=True)

    def _ended_on(self, node: str) -> tuple[int, ...]:
        """Processes of that node that have been replaced. Which of its GPUs each one used is not ours to know: with
        several gone at once Ray deals them anew."""
        return tuple(sorted(pid for where, pid in self._ended if where == node))

    def _meeting(self, timeout_s: float) -> Meeting:
        """A rendezvous of this epoch's own, bound to the group's own interface; its keys begin with a secret."""
        host = interface_address(self.config.parallel.interface)
        if self.config.parallel.tp == 1:
            return Meeting(host, 0, "", self.epoch, timeout_s)
        listener = socket.create_server((host, 0))
        port = listener.getsockname()[1]
        self._store = import_module(STORE).TCPStore(
            host,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
            master_listen_fd=listener.detach(),
        )
        return Meeting(host, port, secrets.token_hex(16), self.epoch, timeout_s)

    def _all(self, calls: list[Any], timeout_s: float, ranks: list[int] | None = None) -> list[Any]:
        """The answers in the order of the calls. The first failure is raised at once: others may be waiting for it.

        ranks: whose call each one is, by default rank 0, 1, ...
        """
        who = dict(zip(calls, range(len(calls)) if ranks is None else ranks, strict=True))
        answers: dict[Any, Any] = {}
        deadline = time.monotonic() + timeout_s
        while waiting := [c for c in calls if c not in answers]:
            ready, _ = ray.wait(waiting, num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                late = ", ".join(str(who[c]) for c in waiting)
                raise RankDied(f"rank {late} did not answer within {timeout_s:.0f} s", rank=who[waiting[0]])
            answers[ready[0]] = _answer(who[ready[0]], ready[0])
        return [answers[c] for c in calls]


def first_line(error: BaseException) -> str:
    """What Ray says, without its report."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _answer(rank: int, call: Any) -> Any:
    try:
        answer = ray.get(call)
    except RayTaskError as error:
        raise RankDied(f"rank {rank} failed: {error.cause}", rank=rank) from error
    except RayError as error:
        raise RankDied(f"rank {rank} died: {first_line(error)}", rank=rank) from error
    if isinstance(answer, Refusal):
        raise ConfigError(answer.reason)
    return answer


def _left(rank: int, call: Any) -> bool:
    """Whether a rank has left its group in order."""
    try:
        return bool(ray.get(call))
    except RayError as error:
        _log.warning("rank=%d cannot leave its group: %s", rank, first_line(error))
        return False


def _kill_on(node: str, pid: int) -> None:
    """End a process of another node; where that node cannot be reached, its process cannot reach us either."""
    on_it = NodeAffinitySchedulingStrategy(node, soft=False)
    task = ray.remote(processes.kill).options(num_cpus=0, scheduling_strategy=on_it, max_retries=0)
    try:
        ray.get(task.remote(pid, REMOTE_KILL_TIMEOUT_S), timeout=REMOTE_KILL_TIMEOUT_S)
    except RayError as error:
        _log.warning("process=%d on node=%s may live on: %s", pid, node, first_line(error))
