"""Ranks as Ray actors. Ray places, starts and watches them; steps never pass through it.

The owner (a Serve replica, or the process of the offline API) holds the rendezvous store and the actors; the engine only
gets channel addresses, so it may live in another process and be replaced without the ranks.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
import torch.distributed as dist
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from tpqwen.config import Config, resolve_device
from tpqwen.errors import ConfigError, EngineError
from tpqwen.executor.rank import serve_steps
from tpqwen.executor.ranks import RingExecutor
from tpqwen.executor.titles import keep_title
from tpqwen.executor.wiring import Hub, Plain, interface_address, join
from tpqwen.parallel.group import join_group
from tpqwen.step import Capacity, RankStats, StepInput, StepOutput
from tpqwen.transport.channel import Sender
from tpqwen.worker.worker import Worker

LOAD_TIMEOUT_S = 1800.0
JOIN_TIMEOUT_S = 120.0
CALL_TIMEOUT_S = 60.0

_log = logging.getLogger(__name__)


class RankProcess:
    """One rank in its own process. Everything it holds can be rebuilt: weights, KV blocks, the last tokens."""

    def __init__(self, options: dict[str, Any], rank: int) -> None:
        self._config = Config.load(options, {})
        self._rank = rank
        self._worker: Worker | None = None
        self._outbox: Sender | None = None
        keep_title(f"tpqwen rank {rank}/{self._config.parallel.tp}")

    def node(self) -> str:
        """The Ray node that this rank runs on."""
        return str(ray.get_runtime_context().get_node_id())

    def pid(self) -> int:
        return os.getpid()

    def load(self, folder: str, store: tuple[str, int, str], epoch: int) -> Capacity | str:
        """Join the group, load this rank's shard and size the cache. A refusal comes back as its sentence."""
        config = self._config
        device, size = resolve_device(config.parallel.device), config.parallel.tp
        host, port, secret = store
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _interface_of(host))
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        try:
            timeout = timedelta(seconds=JOIN_TIMEOUT_S)
            rendezvous = dist.TCPStore(host, port, is_master=False, timeout=timeout) if size > 1 else None
            prefixed = dist.PrefixStore(secret, rendezvous) if rendezvous is not None else None
            group = join_group(self._rank, size, prefixed, epoch, device, JOIN_TIMEOUT_S)
            self._worker = Worker(config, Path(folder), group)
            return self._worker.load()
        except ConfigError as error:
            return str(error)

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
        self._store: dist.TCPStore | None = None
        cuda = resolve_device(config.parallel.device) == "cuda"
        actor = ray.remote(RankProcess)
        self.actors: list[Any] = []
        for rank in range(config.parallel.tp):
            options: dict[str, Any] = {
                "num_cpus": 0,  # placement is by bundles; without them ranks share what there is
                "num_gpus": 1 if cuda else 0,
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
        results = self._all([a.load.remote(str(self._folder), store, self.epoch) for a in self.actors], LOAD_TIMEOUT_S)
        for result in results:
            if isinstance(result, str):
                raise ConfigError(result)
        capacities: list[Capacity] = results
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
                    reason = str(error).strip().splitlines()[0]
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
        self._store = dist.TCPStore(
            host,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=JOIN_TIMEOUT_S),
            master_listen_fd=listener.detach(),
        )
        return host, port, secrets.token_hex(16)

    def _all(self, calls: list[Any], timeout_s: float) -> Any:
        try:
            return ray.get(calls, timeout=timeout_s)
        except GetTimeoutError:
            raise EngineError(f"the ranks did not answer within {timeout_s:.0f} s", code="rank_dead", status=503) from None
        except RayTaskError as error:
            raise EngineError(f"a rank failed: {error.cause}", code="rank_dead", status=503) from error
        except RayError as error:
            raise EngineError(f"a rank died: {error}", code="rank_dead", status=503) from error


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
        self._group = RankGroup(config, folder)
        self._ring: RingExecutor | None = None

    def start(self) -> Capacity:
        """Load all ranks and connect to them. Raises ConfigError or EngineError."""
        try:
            capacity = self._group.load()
            here = str(ray.get_runtime_context().get_node_id())
            host = interface_address(self._group.config.parallel.interface)
            hub = Hub(self._group.nodes(), here, epoch=self._group.epoch, interface=host)
            senders, receivers = hub.connect(self._group.connect(hub.addresses))
        except (ConfigError, EngineError):
            self.stop()
            raise
        self._ring = RingExecutor(capacity, senders, receivers, depth=self.depth)
        return capacity

    @property
    def epoch(self) -> int:
        """What StepInput.epoch must be."""
        return self._group.epoch

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
        return self._group.stats()

    def stop(self) -> None:
        """End the ranks, and Ray if it was started here. Idempotent."""
        if self._ring is not None:
            self._ring.stop()
            self._ring = None
        self._group.stop()
        if self._owns_ray and ray.is_initialized():
            ray.shutdown()
            self._owns_ray = False


def _interface_of(host: str) -> str:
    """Name of the network interface that carries an address, for gloo; loopback's on Linux is lo."""
    return "lo" if host.startswith("127.") else ""
