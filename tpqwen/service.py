"""The Ray Serve deployment: wires configuration, ranks, engine process, text and HTTP together. Wiring only.

The replica is the ingress. It holds no GPU; it owns the engine process and the ranks (`recovery.py` keeps them alive),
all in its placement group: bundle 0 the replica, bundle 1 the engine, then one bundle per rank.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray import serve
from ray.util import get_current_placement_group
from starlette.types import ASGIApp

from tpqwen import __version__, logs
from tpqwen.api.access import Access
from tpqwen.api.app import Elsewhere
from tpqwen.api.app import build_app as build_api
from tpqwen.api.info import ApiSettings, ModelInfo
from tpqwen.board import MetricsBoard
from tpqwen.compiler import GrammarService
from tpqwen.config import Config, api_keys_text, resolve_device
from tpqwen.draining import Drain, end_all
from tpqwen.ending import shutdown_begins
from tpqwen.engine.client import EngineClient
from tpqwen.executor.titles import keep_title
from tpqwen.exporter import Exporter
from tpqwen.exposure import refuse_strangers, serve_host
from tpqwen.fit import check_host_memory
from tpqwen.keyfile import find_keys
from tpqwen.ledger import share_limits
from tpqwen.metrics import ServerMetrics
from tpqwen.model.checkpoint import check_folder, tensor_shapes
from tpqwen.model.config import ModelConfig, Task, check_parallel, detect_task
from tpqwen.model.hashes import Stamp, check_hashes
from tpqwen.model.hub import resolve_model
from tpqwen.model.sizing import derive
from tpqwen.readings import Readings
from tpqwen.recovery import Supervisor
from tpqwen.step import Capacity
from tpqwen.text.chat import ChatFormat, GenerationDefaults
from tpqwen.text.pooling import RerankPrompts
from tpqwen.text.processes import TextProcesses
from tpqwen.text.sequences import Limits
from tpqwen.text.tokenizer import Tokenizer

CPU_SHARE = 0.1  # of a core, per process, where ranks compute on the CPU: a laptop's cores are shared, not reserved
RANK_STATS_EVERY_S = 5.0
YOUNG_OBJECTS = 10_000  # more than before the garbage collector looks at them; its 700 are less than two requests

_log = logging.getLogger(__name__)


class Checked(NamedTuple):
    """What the checks found. stamps: the files whose hashes were right, as they were then."""

    folder: Path
    model: ModelConfig
    stamps: dict[str, Stamp]


def check(config: Config, known: Mapping[str, Stamp] | None = None) -> Checked:
    """Every check that needs no process: options, checkpoint headers, hashes, TP degree. Raises ConfigError.

    known: stamps of an earlier check, whose files are not hashed again.
    """
    stamps: dict[str, Stamp] = {}
    folder = resolve_model(config.model.model, config.model.revision)
    model = ModelConfig.from_folder(folder)
    check_parallel(model, config.parallel.tp)
    derive(config, model)
    if not config.model.random_weights:
        checkpoint = check_folder(folder, tensor_shapes(model))
        stamps = check_hashes(folder, checkpoint.files.values(), config.model.verify, known)
    return Checked(folder, model, stamps)


def bundles(config: Config) -> list[dict[str, float]]:
    """The replica's placement group: itself, the engine, one bundle per rank."""
    if resolve_device(config.parallel.device) == "cuda":
        rank = {"CPU": 1.0, "GPU": config.parallel.gpus_per_rank}
        return [{"CPU": 1.0}, {"CPU": 1.0}, *(dict(rank) for _ in range(config.parallel.tp))]
    return [{"CPU": CPU_SHARE} for _ in range(2 + config.parallel.tp)]


@serve.deployment(
    name="Qwen3Server",
    max_ongoing_requests=4096,
    max_queued_requests=-1,
    health_check_period_s=2,
    health_check_timeout_s=20,  # late is not dead: on a starved machine the loop may be seconds behind
    graceful_shutdown_timeout_s=90,
)
@serve.ingress()
class Qwen3Server:
    """One replica: HTTP, text and metrics here; engine and ranks in processes of their own."""

    def __init__(self, options: dict[str, Any], verified: dict[str, Stamp] | None = None) -> None:
        """verified: files whose hashes whoever built the application has compared."""
        self._config = Config.load(options, {})
        self._folder, self._model, _ = check(self._config, verified)
        self._keys = find_keys(self._config.server.api_keys_file, api_keys_text())
        self._metrics = ServerMetrics(self.served_name, str(serve.get_replica_context().rank.rank))
        self._supervisor: Supervisor | None = None
        self._client: EngineClient | None = None
        self._drain: Drain | None = None
        self._exporter: Exporter | None = None
        self._readings = Readings()
        self._text: TextProcesses | None = None
        self._grammars = GrammarService(self._folder, self._model.vocab_size)
        self._tasks: list[asyncio.Task[None]] = []
        self._answering: Callable[[], int] = lambda: 0
        # sys.stderr may lead to Serve's logger
        logs.configure(self._config.server.log, "replica", sys.__stderr__, asyncio.get_running_loop())
        keep_title("tpqwen replica")

    @property
    def served_name(self) -> str:
        """The model's id in answers."""
        m = self._config.model
        return m.served_model_name or ("tpqwen-demo" if self._is_embedded else m.model)

    @property
    def _is_embedded(self) -> bool:
        return self._config.model.model.endswith("embedded/model")

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        """Called by Serve after the constructor: load everything, then say that this replica is there."""
        server, keys = self._config.server, self._keys[0]
        refuse_strangers(await serve_host(), closed=keys is not None, insecure=server.insecure)
        self._metrics.engine_state("loading")
        text = asyncio.create_task(asyncio.to_thread(self._load_text))
        self._tasks.append(asyncio.create_task(self._grammars.start()))
        self._supervisor = Supervisor(self._config, self._folder, self._metrics, get_current_placement_group())
        self._client = await self._supervisor.start()
        capacity = self._client.capacity
        self._tasks.append(asyncio.create_task(self._read_ranks()))
        self._tasks.append(asyncio.create_task(self._end_in_time()))
        self._metrics.capacity(capacity)
        versions = capacity.versions
        self._metrics.build_info(__version__, ray.__version__, versions.get("torch", ""), versions.get("cuda", ""))
        self._metrics.engine_state("ready")
        self._export_metrics()
        _log.info("ready kv_blocks=%d stages=%s", capacity.num_blocks, json.dumps(capacity.load_seconds))
        chat = await text
        assert self._text is not None
        app = build_api(
            self._client,
            chat,
            self._info(capacity, chat),
            self._metrics,
            self._settings(),
            all_metrics=self._board(),
            elsewhere=Elsewhere(self._text, self._grammars, self._readings.latest),
            access=self._access(),
        )
        self._answering = lambda: app.num_answering
        name = serve.get_replica_context().app_name
        self._drain = Drain(self._client, self._answering, name, self._metrics.engine_state)
        await self._drain.join()
        gc.collect()
        gc.freeze()  # objects of Ray and others: with torch's a million, and looking through them a fifth of a request
        gc.set_threshold(YOUNG_OBJECTS)
        return app

    def check_health(self) -> None:
        """Serve's probe: a local flag only, so that a slow rank never counts against this replica."""
        client = self._client
        if client is not None and client.state.name == "dead":
            raise RuntimeError(client.state.reason)

    async def describe(self) -> dict[str, Any]:
        """What the start banner says."""
        assert self._client is not None
        capacity = self._client.capacity
        return {
            "model": self.served_name,
            "tp": self._config.parallel.tp,
            "device": resolve_device(self._config.parallel.device),
            "kv_tokens": (capacity.num_blocks - 1) * capacity.block_size,
            "max_model_len": capacity.max_model_len,
            "load_seconds": capacity.load_seconds,
            "closed": self._keys[0] is not None,
        }

    async def drain(self, grace_s: float) -> int:
        """Take nothing new while somebody stops this application (`stopping.py`); what is open after grace_s ends with
        an error. Returns at once: how many requests are open."""
        assert self._drain is not None
        return self._drain.begin(grace_s)

    async def __del__(self) -> None:
        """Serve calls this after the drain: end everything this replica started."""
        if "_tasks" not in self.__dict__:  # the constructor did not end
            return
        for task in self._tasks:
            task.cancel()
        if self._drain is not None:
            self._drain.close()
        if self._exporter is not None:
            self._exporter.close()
        if self._text is not None:
            self._text.close()
        await self._grammars.close()
        if self._supervisor is not None:
            await self._supervisor.stop()

    async def _end_in_time(self) -> None:
        """When Serve ends this replica (delete, update, scaling, a node that drains) it routes nothing new here, waits
        and then kills: what would be open by then ends before, with one error in place of a torn stream."""
        grace_s = await shutdown_begins()
        assert self._client is not None
        if grace_s is not None:
            await end_all(self._client, self._answering, grace_s)

    def _settings(self) -> ApiSettings:
        options = self._config.server
        return ApiSettings(
            max_body_bytes=options.max_body_bytes,
            send_request_id=False,
            first_token_timeout_s=options.first_token_timeout,
            total_timeout_s=options.total_timeout,
        )

    def _access(self) -> Access:
        """Keys and limits, both kept up to date."""
        keys, file = self._keys
        if keys is None:
            return Access()
        access = Access(keys, open_metrics=self._config.server.open_metrics)
        context = serve.get_replica_context()
        self._tasks.append(asyncio.create_task(share_limits(access.limiter, context.replica_tag, context.app_name)))
        if file is not None:
            self._tasks.append(asyncio.create_task(file.follow(keys)))
        _log.info("API keys in force ids=%s", ",".join(keys.ids))
        return access

    def _board(self) -> Callable[[], Awaitable[str]]:
        """The metrics of all replicas, which this one's are left for."""
        context = serve.get_replica_context()
        board = MetricsBoard(context.replica_tag, context.app_name, self._metrics.metrics_text)
        self._tasks.append(asyncio.create_task(board.keep()))
        return board.everyone

    def _export_metrics(self) -> None:
        options = self._config.server
        if options.metrics_port:
            port = options.metrics_port + serve.get_replica_context().rank.local_rank
            host = ray.util.get_node_ip_address() if options.metrics_host == "node" else options.metrics_host
            self._exporter = Exporter(self._metrics.metrics_text, port, host)

    def _load_text(self) -> ChatFormat:
        text = ChatFormat(Tokenizer(self._folder), GenerationDefaults(**self._model.generation_defaults))
        assert text.vocabulary.size  # built now, not in the first request
        self._text = TextProcesses(self._folder, derive(self._config, self._model).max_model_len)
        self._text.start()
        source = text.model.chat_template
        if source is not None:
            _log.info("chat template variant=%s sha256=%s", text.variant, sha256(source.encode()).hexdigest())
        return text

    async def _read_ranks(self) -> None:
        """Memory and NVML of every rank now and then, far from the steps; and the engine's state for the metrics."""
        assert self._client is not None
        assert self._supervisor is not None
        while True:
            self._metrics.engine_state(self._client.state.name)
            if self._supervisor.group is not None:
                stats = await asyncio.to_thread(self._supervisor.group.stats)
                self._metrics.observe_ranks(stats, self._config.parallel.tp)
                self._readings.observe(stats, self._config.parallel.tp, time.monotonic())
            await asyncio.sleep(RANK_STATS_EVERY_S)

    def _info(self, capacity: Capacity, chat: ChatFormat) -> ModelInfo:
        ids = min(self._model.vocab_size, chat.vocabulary.size)
        limits = Limits(capacity.max_model_len, ids, self._model.eos_token_ids)
        versions = {"tpqwen": __version__, "ray": ray.__version__, "transformers": version("transformers")}
        m = self._config.model
        task = detect_task(self._folder, m.model, m.task)
        return ModelInfo(
            name=self.served_name,
            limits=limits,
            task=task,
            hidden_size=self._model.hidden_size,
            yes_no=RerankPrompts(chat.model).yes_no if task is Task.RERANK else (0, 0),
            created=int(time.time()),
            tp=self._config.parallel.tp,
            versions=versions | capacity.versions,
            demonstration=self._is_embedded,
        )


def build_app(config: Config, *, here: bool = False) -> serve.Application:
    """The Serve application. here: it will run on this machine, whose memory must do.

    Raises ConfigError before any process is started.
    """
    _, model, verified = check(config)
    if here:
        check_host_memory(config, model)
    options = {k: v for k, v in config.flat().items() if v is not None}
    where = bundles(config)
    server: Any = Qwen3Server  # a Deployment, by Serve's decorator
    # Our line for each request says more than Serve's. Elsewhere the application's own configuration decides.
    logs = {"logging_config": {"enable_access_log": False}} if here else {}
    deployment = server.options(
        **logs,
        ray_actor_options={"num_cpus": where[0]["CPU"], "num_gpus": 0},
        placement_group_bundles=where,
        placement_group_strategy="STRICT_PACK" if config.parallel.interface is None else "PACK",
    )
    return deployment.bind(options, verified)
