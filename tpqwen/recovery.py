"""Keeps one replica's engine process and ranks alive: it starts them, replaces what dies, and gives up in words.

It runs in the replica, which owns the actors. Faults arrive on the event loop: the engine says that it lost ranks, or a
pending Ray call says that the engine itself has ended. One task takes them one after the other; the blocking part of a
repair runs in a thread. Open requests live in the EngineClient meanwhile, with every token that was received.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from tpqwen.budget import ENGINES, REPAIRS, Budget
from tpqwen.config import Config
from tpqwen.engine.client import EngineClient
from tpqwen.engine.messages import Dead, Lost, RanksLost, Resume, Resumed
from tpqwen.engine.process import EngineProcess
from tpqwen.errors import ConfigError, EngineError, RankDied
from tpqwen.executor import processes
from tpqwen.executor.rank_group import Process, RankGroup, Repair, first_line
from tpqwen.executor.wiring import Plain
from tpqwen.step import Capacity, StepStats
from tpqwen.transport.channel import from_plain, open_channel, to_plain
from tpqwen.transport.ring import RingReader, RingWriter
from tpqwen.transport.tcp import TcpChannel

ENGINE_BUNDLE = 1
FIRST_RANK_BUNDLE = 2
START_ATTEMPTS = 3
CONNECT_TIMEOUT_S = 30.0
LOOK_S = 0.5  # how often to look for stopped processes; one that is stopped twice in a row is ended
SILENCE_S = 240.0  # of an engine that has requests; its own deadlines, which end in a report, are all shorter
STAGES = ("detect", "part", "start", "load", "rejoin", "replay")

_log = logging.getLogger(__name__)


class RecoveryHooks(Protocol):
    """What metrics hear."""

    def observe(self, stats: StepStats) -> None:
        """After each step."""

    def recovered(self, seconds: dict[str, float]) -> None:
        """Ranks or the engine were replaced under living requests; seconds by stage (STAGES)."""

    def engine_state(self, name: str) -> None:
        """The engine's state is now `name`."""


@dataclass(frozen=True)
class Fault:
    """Something is gone. ranks: those known to be; engine: the engine's actor, when it is that."""

    reason: str
    code: str = "rank_dead"
    ranks: tuple[int, ...] = ()
    epoch: int = 0
    engine: Any = None
    silent_s: float = 0.0

    @property
    def hangs(self) -> bool:
        """Whether some rank does not go on, without it being known which one."""
        return self.engine is None and not self.ranks


class Supervisor:
    """The processes of one replica. start, then leave it alone; `client` is what requests go through."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        hooks: RecoveryHooks,
        placement: PlacementGroup | None = None,
        *,
        repairs: Budget | None = None,
        engines: Budget | None = None,
        silence_s: float = SILENCE_S,
    ) -> None:
        self._config = config
        self._folder = folder
        self._hooks = hooks
        self._placement = placement
        self._repairs = repairs or Budget(REPAIRS)
        self._engines = engines or Budget(ENGINES)
        self._silence_s = silence_s
        self._faults: asyncio.Queue[Fault] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._repaired: tuple[str, dict[str, float]] | None = None  # what waits for its first tokens
        self._engine: Any = None
        self._engine_pid = 0
        self._engine_started = True
        self._stopping = False
        self.group: RankGroup | None = None
        self.client: EngineClient | None = None

    async def start(self) -> EngineClient:
        """Load the ranks, start the engine process and connect all. Raises ConfigError, or EngineError in the end."""
        self._spawn(self._watch_stopped())
        ended: set[Process] = set()
        for attempt in range(1, START_ATTEMPTS + 1):
            try:
                capacity, commands, reports = await asyncio.to_thread(self._start, ended)
                break
            except EngineError as error:
                _log.error("start attempt=%d of=%d failed: %s", attempt, START_ATTEMPTS, error)
                ended |= self._end_processes()
                if attempt == START_ATTEMPTS:
                    raise
            except BaseException:
                self._end_processes()
                raise
        client = self.client = EngineClient(
            commands,
            reports,
            capacity,
            self._config.schedule,
            self._hooks.observe,
            on_fault=self._on_fault,
            on_resumed=self._on_resumed,
            queue_timeout_s=self._config.server.queue_timeout,
        )
        assert self.group is not None
        self.group.keep_spare()
        for rank in range(len(self.group.actors)):
            self._spawn(self._watch_rank(rank))
        self._spawn(self._watch_engine(self._engine))
        self._spawn(self._watch_silence(client))
        self._spawn(self._take_faults())
        return client

    async def stop(self) -> None:
        """End every process and every open request. Idempotent."""
        self._stopping = True
        for task in list(self._tasks):
            task.cancel()
        if self.client is not None:
            await self.client.close()
        self._end_processes()

    @property
    def engine_pid(self) -> int:
        """The engine's process."""
        return self._engine_pid

    # Starting and connecting: blocking, in a thread

    def _start(self, ended: set[Process]) -> tuple[Capacity, RingWriter, RingReader | TcpChannel]:
        """ended: the ranks of attempts before this one."""
        group = self.group = RankGroup(self._config, self._folder, self._placement, FIRST_RANK_BUNDLE, ended)
        self._engine = self._new_engine()  # starts while the ranks load
        capacity = group.load()
        self._engine_pid = self._ask_engine("pid")
        answers = self._open_channels()
        return capacity, *self._start_engine(answers)

    def _new_engine(self) -> Any:
        options: dict[str, Any] = {"num_cpus": 0, "max_restarts": 0, "max_task_retries": 0, "max_concurrency": 4}
        if self._placement is not None:
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                self._placement, placement_group_bundle_index=ENGINE_BUNDLE
            )
        given = {k: v for k, v in self._config.flat().items() if v is not None}
        return ray.remote(EngineProcess).options(**options).remote(given)

    def _open_channels(self) -> list[Plain | None]:
        """Give the engine's addresses to the ranks; where their answers are."""
        group = self.group
        assert group is not None
        return group.connect(self._ask_engine("open", group.nodes(), group.epoch))

    def _start_engine(self, answers: list[Plain | None]) -> tuple[RingWriter, RingReader | TcpChannel]:
        """A new engine process over connected ranks, and our channels to it."""
        group = self.group
        assert group is not None
        commands = RingWriter(1)
        plain = to_plain(commands.address(0))
        report = from_plain(self._ask_engine("start", answers, plain, group.capacity, group.epoch))
        assert report is not None
        return commands, open_channel(report, CONNECT_TIMEOUT_S)

    def _ask_engine(self, method: str, *args: Any) -> Any:
        try:
            return ray.get(getattr(self._engine, method).remote(*args), timeout=2 * CONNECT_TIMEOUT_S)
        except RayError as error:
            text = f"the engine process does not {method}: {first_line(error)}"
            raise EngineError(text, code="engine_dead", status=503) from error

    def _end_processes(self) -> set[Process]:
        """End all there are; which ranks those were."""
        if self._engine is not None:
            ray.kill(self._engine, no_restart=True)
            self._engine = None
        if self._engine_pid and processes.is_stopped(self._engine_pid):  # Ray's way takes seconds with these
            processes.kill(self._engine_pid, 0.0)
        self._engine_pid = 0
        group, self.group = self.group, None
        return group.stop() if group is not None else set()

    # Noticing: on the event loop

    def _on_fault(self, report: Lost | Dead) -> None:
        if isinstance(report, Dead):
            self._faults.put_nowait(Fault(report.reason, report.code, engine=self._engine))
        else:
            ranks = tuple(report.ranks)
            self._faults.put_nowait(Fault(report.reason, report.code, ranks, report.epoch, None, report.silent_s))

    def _on_resumed(self, report: Resumed) -> None:
        group = self.group
        if self._repaired is None or group is None or report.epoch != group.epoch or self.client is None:
            return
        (what, seconds), self._repaired = self._repaired, None
        seconds["replay"] = report.replay_s
        stages = " ".join(f"{name}_s={seconds.get(name, 0.0):.2f}" for name in STAGES)
        _log.warning("recovered what=%s epoch=%d %s", what, group.epoch, stages)
        self.client.recovered()
        self._hooks.engine_state(self.client.state.name)
        self._hooks.recovered(seconds)
        group.keep_spare()

    async def _watch_rank(self, rank: int) -> None:
        group = self.group
        assert group is not None
        reason = await group.wait_for_end(rank)
        if reason is not None and not self._stopping and self.client is not None:
            _log.error("rank=%d ended reason=%s", rank, reason)
            self.client.send(RanksLost(reason, rank, group.epoch))

    async def _watch_engine(self, engine: Any) -> None:
        try:
            await engine.wait.remote()
        except RayError as error:
            self._faults.put_nowait(
                Fault(f"the engine process died: {first_line(error)}", "engine_dead", engine=engine)
            )

    async def _watch_silence(self, client: EngineClient) -> None:
        """An engine that lives, has requests and says nothing is of no use either."""
        while True:
            await asyncio.sleep(LOOK_S)
            if client.silent_s > self._silence_s:
                text = f"the engine process has said nothing for {client.silent_s:.0f} s"
                await self._faults.put(Fault(text, "engine_dead", engine=self._engine, silent_s=client.silent_s))

    async def _watch_stopped(self) -> None:
        """A stopped process is not dead and never will be: end it, and the rest follows as from any death."""
        before: set[int] = set()
        while True:
            await asyncio.sleep(LOOK_S)
            pids = [self._engine_pid, *(self.group.local_pids() if self.group is not None else [])]
            stopped = {pid for pid in pids if pid and processes.is_stopped(pid)}
            for pid in stopped & before:
                _log.error("process=%d is stopped and does not go on: it is ended", pid)
                await asyncio.to_thread(processes.kill, pid)
            before = stopped

    # Recovering: one fault after the other

    async def _take_faults(self) -> None:
        while True:
            fault = await self._faults.get()
            if not self._is_stale(fault):
                try:
                    await self._recover(fault)
                except Exception as error:  # a bug of ours must not leave requests without an end
                    _log.exception("the recovery failed")
                    self._give_up(f"the recovery failed: {type(error).__name__}: {error}", "internal")

    def _is_stale(self, fault: Fault) -> bool:
        """Whether what the fault is about has been replaced already, or nothing is to be repaired any more."""
        client, group = self.client, self.group
        if self._stopping or client is None or group is None or client.state.name == "dead":
            return True
        return fault.engine is not self._engine if fault.engine is not None else fault.epoch != group.epoch

    async def _recover(self, fault: Fault) -> None:
        """Repair until it holds. Another death meanwhile is one more fault, on the same budgets."""
        assert self.client is not None
        detected = {"detect": fault.silent_s}
        while True:
            now = time.monotonic()
            what = "the engine" if fault.engine is not None else _named(fault.ranks)
            _log.warning("recovering what=%s reason=%s", what, fault.reason)
            self.client.degrade(f"{what} restarting: {fault.reason}")
            self._hooks.engine_state(self.client.state.name)
            if not self._repairs.take(now) or (fault.engine is not None and not self._engines.take(now)):
                self._give_up(f"{fault.reason}; it has been repaired too often lately", fault.code)
                return
            try:
                await self._repair(fault, detected)
                return
            except ConfigError as error:
                self._give_up(f"{fault.reason}; it cannot be repaired: {error}", fault.code)
                return
            except RankDied as error:
                assert self.group is not None
                ranks = () if error.rank is None else (error.rank,)
                fault = Fault(str(error), error.code, ranks, self.group.epoch)
            except (EngineError, ConnectionError, TimeoutError) as error:  # the engine, since it was no rank
                fault = Fault(str(error), "engine_dead", engine=self._engine)

    async def _repair(self, fault: Fault, seconds: dict[str, float]) -> None:
        """One attempt. Raises RankDied, EngineError (the engine's) or ConfigError."""
        client, group = self.client, self.group
        assert client is not None
        assert group is not None
        if fault.engine is not None:
            client.detach()
            if self._engine_pid:
                await asyncio.to_thread(processes.kill, self._engine_pid)
            ray.kill(fault.engine, no_restart=True)
            self._engine, self._engine_pid, self._engine_started = self._new_engine(), 0, False
            self._spawn(self._watch_engine(self._engine))
        new_engine = not self._engine_started  # perhaps since an attempt that failed
        self._repaired = None
        repair: Repair = await asyncio.to_thread(group.repair, fault.ranks, hung=fault.hangs)
        for rank in repair.replaced:
            self._spawn(self._watch_rank(rank))
        begin = time.monotonic()
        if new_engine:
            self._engine_pid = await asyncio.to_thread(self._ask_engine, "pid")
            repair.seconds["start"] += time.monotonic() - begin
            begin = time.monotonic()
        answers = await asyncio.to_thread(self._open_channels)
        self._repaired = ("engine" if new_engine else "ranks", seconds)
        assert group.capacity is not None
        if new_engine:
            channels = await asyncio.to_thread(self._start_engine, answers)
            client.reattach(*channels, group.capacity)
            self._engine_started = True
        client.send(Resume(group.epoch, group.capacity, answers))
        repair.seconds["rejoin"] += time.monotonic() - begin
        for stage, took in repair.seconds.items():
            seconds[stage] = seconds.get(stage, 0.0) + took

    def _give_up(self, reason: str, code: str) -> None:
        assert self.client is not None
        _log.error("giving up reason=%s", reason)
        self.client.fail(reason, code)
        self._hooks.engine_state(self.client.state.name)

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _named(ranks: tuple[int, ...]) -> str:
    return f"rank {', '.join(map(str, ranks))}" if ranks else "a rank"
