"""Ranks as Ray actors. Ray places, starts and watches them; steps never pass through it.

The owner (a Serve replica, or the process of the offline API) holds the rendezvous store and the actors; the engine
only gets channel addresses, so it may live in another process and be replaced without the ranks.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch._C._distributed_c10d import TCPStore
from torch.distributed.distributed_c10d import PrefixStore

from tpqwen import logs
from tpqwen.config import Config, resolve_device
from tpqwen.errors import ConfigError, EngineError, RankDied
from tpqwen.executor.rank import serve_steps
from tpqwen.executor.ranks import RingExecutor
from tpqwen.executor.titles import keep_title
from tpqwen.executor.wiring import Hub, Plain, interface_address, join
from tpqwen.parallel.group import TPGroup, join_group
from tpqwen.step import Capacity, RankStats, StepInput, StepOutput
from tpqwen.transport.channel import Sender
from tpqwen.worker.worker import Worker

LOAD_TIMEOUT_S = 1800.0
JOIN_TIMEOUT_S = 120.0
CALL_TIMEOUT_S = 60.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Refusal:
    """A rank's ConfigError as an answer; Ray would wrap a raised one in a report of its own."""

    reason: str


class RankProcess:
    """One rank in its own process. Everything it holds can be rebuilt: weights, KV blocks, the last tokens."""

    def __init__(self, options: dict[str, Any], rank: int) -> None:
        self._config = Config.load(options, {})
        self._rank = rank
        self._worker: Worker | None = None
        self._outbox: Sender | None = None
        logs.configure(self._config.server.log, f"rank {rank}/{self._config.parallel.tp}")
        keep_title(f"tpqwen rank {rank}/{self._config.parallel.tp}")

    def node(self) -> str:
        """The Ray node that this rank runs on."""
        return str(ray.get_runtime_context().get_node_id())

    def pid(self) -> int:
        return os.getpid()

    def load(self, folder: str, store: tuple[str, int, str], epoch: int) -> Capacity | Refusal:
        """Join the group, load this rank's shard and size the cache. A ConfigError is returned."""
        config = self._config
        device, size = resolve_device(config.parallel.device), config.parallel.tp
        host, port, secret = store
        interface = config.parallel.interface or _loopback()
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        try:
            group = TPGroup.single()
            if size > 1:
                timeout = timedelta(seconds=JOIN_TIMEOUT_S)
                rendezvous = PrefixStore(secret, TCPStore(host, port, is_master=False, timeout=timeout))
                group = join_group(self._rank, size, rendezvous, epoch, device, JOIN_TIMEOUT_S)
            self._worker = Worker(config, Path(folder), group)
            capacity = self._worker.load()
            self._worker.read_vocabulary()
            return capacity
        except ConfigError as error:
            return Refusal(str(error))

    def connect(self, address: Plain, epoch: int) -> Plain | None:
        """Attach to the engine's steps and begin to serve them. Returns the address of the answers."""
        assert self._worker is not None
        if address["type"] == "tcp":  # the engine accepts only once every rank has been called
            threading.Thread(target=self._dial_and_serve, args=(address, epoch), name="steps", daemon=True).start()
            return None
        inbox, outbox, answers = join(address, epoch=epoch)
        self._outbox = outbox
        args = {"epoch": epoch, "answers": self._rank == 0}
        threading.Thread(
            target=serve_steps, args=(self._worker, inbox, outbox), kwargs=args, name="steps", daemon=True
        ).start()
        return answers

    def wait(self) -> None:
        """Never returns: a pending call whose failure tells the owner at once that this process has ended."""
        threading.Event().wait()

    def stats(self) -> RankStats | None:
        """Slow numbers; None before loading."""
        return self._worker.stats() if self._worker is not None else None

    def _dial_and_serve(self, address: Plain, epoch: int) -> None:
        assert self._worker is not None
        inbox, outbox, _ = join(address, epoch=epoch)
        serve_steps(self._worker, inbox, outbox, epoch=epoch, answers=self._rank == 0)


class RankGroup:
    """The owner's side of all ranks. placement: bundles [first_bundle ..] take one rank each; None places freely."""

    def __init__(
        self, config: Config, folder: Path, placement: PlacementGroup | None = None, first_bundle: int = 0
    ) -> None:
        self.config = config
        self.epoch = 1
        self._folder = folder
        self._store: TCPStore | None = None
        cuda = resolve_device(config.parallel.device) == "cuda"
        actor = ray.remote(RankProcess)
        self.actors: list[Any] = []
        for rank in range(config.parallel.tp):
            options: dict[str, Any] = {
                "num_cpus": 0,  # placement is by bundles; without them ranks share what there is
                "num_gpus": config.parallel.gpus_per_rank if cuda else 0,
                "max_restarts": 0,
                "max_task_retries": 0,
                "max_concurrency": 4,
            }
            if placement is not None:
                options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                    placement, placement_group_bundle_index=first_bundle + rank
                )
            given = {k: v for k, v in config.flat().items() if v is not None}
            self.actors.append(actor.options(**options).remote(given, rank))

    def load(self) -> Capacity:
        """Load all ranks side by side; what they can hold together. Raises ConfigError or EngineError."""
        store = self._open_store()
        calls = [a.load.remote(str(self._folder), store, self.epoch) for a in self.actors]
        capacities: list[Capacity] = self._all(calls, LOAD_TIMEOUT_S)
        least = min(capacities, key=lambda c: c.num_blocks)
        slowest = max(capacities, key=lambda c: sum(c.load_seconds.values()))
        return Capacity(
            num_blocks=least.num_blocks,
            block_size=least.block_size,
            max_num_seqs=least.max_num_seqs,
            max_model_len=least.max_model_len,
            max_batched_tokens=least.max_batched_tokens,
            kv_dtype=least.kv_dtype,
            load_seconds=slowest.load_seconds,
        )

    def nodes(self) -> list[str]:
        """The Ray node of each rank."""
        return list(self._all([a.node.remote() for a in self.actors], CALL_TIMEOUT_S))

    def pids(self) -> list[int]:
        """The process of each rank."""
        return list(self._all([a.pid.remote() for a in self.actors], CALL_TIMEOUT_S))

    def connect(self, addresses: list[Plain | None]) -> list[Plain | None]:
        """Give each rank the address of its steps; returns those of their answers."""
        calls = [a.connect.remote(p, self.epoch) for a, p in zip(self.actors, addresses, strict=True)]
        return list(self._all(calls, CALL_TIMEOUT_S))

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

    def watch(self, on_death: Callable[[int, str], None]) -> None:
        """Call on_death(rank, reason) from a thread when a rank's process ends unasked; Ray notices within a second."""

        def wait() -> None:
            calls = {actor.wait.remote(): rank for rank, actor in enumerate(self.actors)}
            ready, _ = ray.wait(list(calls), num_returns=1)
            if self.actors and ready:
                try:
                    ray.get(ready[0])
                    reason = "its process was asked to end"
                except RayError as error:
                    reason = _first_line(error)
                on_death(calls[ready[0]], f"rank {calls[ready[0]]} died: {reason}")

        threading.Thread(target=wait, name="rank-watch", daemon=True).start()

    def stop(self) -> None:
        """Kill every rank; nothing of the group is left. Idempotent."""
        for actor in self.actors:
            ray.kill(actor, no_restart=True)
        self.actors = []
        self._store = None

    def _open_store(self) -> tuple[str, int, str]:
        """The rendezvous, bound to the group's own interface; its keys begin with a secret of this group."""
        host = interface_address(self.config.parallel.interface)
        if self.config.parallel.tp == 1:
            return host, 0, ""
        listener = socket.create_server((host, 0))
        port = listener.getsockname()[1]
        self._store = TCPStore(
            host,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=JOIN_TIMEOUT_S),
            master_listen_fd=listener.detach(),
        )
        return host, port, secrets.token_hex(16)

    def _all(self, calls: list[Any], timeout_s: float) -> list[Any]:
        """The answers in rank order. The first failure is raised at once: the others may be waiting for that rank."""
        answers: dict[Any, Any] = {}
        deadline = time.monotonic() + timeout_s
        while waiting := [c for c in calls if c not in answers]:
            ready, _ = ray.wait(waiting, num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                late = ", ".join(str(calls.index(c)) for c in waiting)
                message = f"rank {late} did not answer within {timeout_s:.0f} s"
                raise EngineError(message, code="rank_dead", status=503)
            answers[ready[0]] = self._answer(calls.index(ready[0]), ready[0])
        return [answers[c] for c in calls]

    def _answer(self, rank: int, call: Any) -> Any:
        try:
            answer = ray.get(call)
        except RayTaskError as error:
            raise EngineError(f"rank {rank} failed: {error.cause}", code="rank_dead", status=503) from error
        except RayError as error:
            raise RankDied(f"rank {rank} died: {_first_line(error)}", rank=rank) from error
        if isinstance(answer, Refusal):
            raise ConfigError(answer.reason)
        return answer


class RayExecutor:
    """Implements executor.protocol.Executor with Ray ranks and the engine in this process: the offline API with tp > 1.

    Starts a private Ray on this machine unless one is initialised already.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        self.depth = config.schedule.depth
        self._owns_ray = not ray.is_initialized()
        if self._owns_ray:
            os.environ.setdefault("RAY_AUTH_MODE", "disabled")
            os.environ.setdefault("RAY_DISABLE_USAGE_STATS", "1")
            ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
        self.ranks = RankGroup(config, folder)
        self._ring: RingExecutor | None = None

    def start(self) -> Capacity:
        """Load all ranks and connect to them. Raises ConfigError or EngineError."""
        try:
            capacity = self.ranks.load()
            here = str(ray.get_runtime_context().get_node_id())
            host = interface_address(self.ranks.config.parallel.interface)
            hub = Hub(self.ranks.nodes(), here, epoch=self.ranks.epoch, interface=host)
            links = hub.connect(self.ranks.connect(hub.addresses))
        except (ConfigError, EngineError):
            self.stop()
            raise
        self._ring = RingExecutor(capacity, links, depth=self.depth, epoch=self.epoch)
        return capacity

    @property
    def epoch(self) -> int:
        """What StepInput.epoch must be."""
        return self.ranks.epoch

    def submit(self, step: StepInput) -> None:
        """See RingExecutor."""
        assert self._ring is not None
        self._ring.submit(step)

    def collect(self, timeout_s: float) -> StepOutput:
        """See RingExecutor."""
        assert self._ring is not None
        return self._ring.collect(timeout_s)

    def ready(self) -> bool:
        """See RingExecutor."""
        assert self._ring is not None
        return self._ring.ready()

    def stats(self) -> list[RankStats]:
        """Slow numbers of every rank that answers."""
        return self.ranks.stats()

    def stop(self) -> None:
        """End the ranks, and Ray if it was started here. Idempotent."""
        if self._ring is not None:
            self._ring.stop()
            self._ring = None
        self.ranks.stop()
        if self._owns_ray and ray.is_initialized():
            ray.shutdown()
            self._owns_ray = False


def _loopback() -> str:
    """Name of the loopback interface."""
    return next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")


def _first_line(error: BaseException) -> str:
    """What Ray says, without its report."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
