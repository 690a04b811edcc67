"""All options, in five frozen sections, parsed once. `Config.load` is the only door; everything else is derived.

The environment is read here and nowhere else: TPQWEN_<OPTION> (for example TPQWEN_MODEL) stands in for an option that
was not given. Unknown options are refused, with the nearest known name.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tpqwen.errors import ConfigError

EMBEDDED_MODEL = str(Path(__file__).with_name("embedded") / "model")
TP_DEGREES = (1, 2, 4, 8)
QUANTIZATIONS = ("none", "int8")
SPECULATIONS = ("off", "ngram")
MAX_DRAFTS = 15  # with the row's own token they fill a tile of attention
INGRESSES = ("serve", "haproxy")


@dataclass(frozen=True)
class ModelOptions:
    """Which weights. model: a folder in Hugging Face format or a Hub id; random: weights drawn from its config."""

    model: str = EMBEDDED_MODEL
    revision: str | None = None
    served_model_name: str | None = None
    dtype: str = "auto"  # auto | float32 | bfloat16 | float16
    quantization: str = "none"  # none | int8; of the projections' weights, while they are loaded
    deterministic: bool = False  # bits that depend on a request alone, never on its batch; slower
    max_model_len: int | None = None  # None: what the checkpoint allows
    random_weights: bool = False
    verify: bool | None = None  # files against their SHA-256; None: where a list of hashes lies beside them
    task: str = "auto"  # auto | generate | embed | rerank; auto: by the folder's files and the model's name


@dataclass(frozen=True)
class ParallelOptions:
    """How many ranks and where. device auto: cuda when there is one, else cpu."""

    tp: int = 1
    device: str = "auto"  # auto | cpu | cuda
    gpus_per_rank: float = 1.0  # below 1 several ranks share a GPU: slow, for testing on one
    interface: str | None = None  # network interface of rank-to-rank traffic; None: loopback on one node
    threads: int | None = None  # CPU threads of each rank; None: an equal share of the cores
    warm_spare: bool = False  # keep one process started that holds no GPU, for the next rank that is lost

    @property
    def num_gpus(self) -> int:
        """GPUs that all ranks need: one rank never spans two, several may share one."""
        return -(-self.tp // int(1.0 / self.gpus_per_rank))


@dataclass(frozen=True)
class CacheOptions:
    """The paged KV cache. None means derived: block size by device, blocks from the memory left."""

    block_size: int | None = None  # tokens
    num_kv_blocks: int | None = None
    memory_fraction: float = 0.90  # of the device's memory, weights included
    prefix_cache: bool = True


@dataclass(frozen=True)
class ScheduleOptions:
    """One step's limits. depth: steps in flight (2 hides the host behind the device)."""

    max_num_seqs: int | None = None
    max_batched_tokens: int | None = None
    depth: int = 2
    max_waiting: int = 512
    max_waiting_tokens: int = 256 * 1024  # beyond what the free pages hold
    speculation: str = "off"  # off | ngram: draft tokens from what a sequence repeats of itself, where that pays
    draft_tokens: int = 7  # for each row of such a step; with the row's own token 8

    @property
    def num_drafts(self) -> int:
        """draft_tokens, or 0 without speculation."""
        return self.draft_tokens if self.speculation != "off" else 0


@dataclass(frozen=True)
class ServerOptions:
    """The HTTP surface. console/ray_settings.py reads `ingress` once more, before Ray is imported."""

    host: str = "127.0.0.1"
    port: int = 8000
    ingress: str = "serve"  # serve: Serve's own proxy; haproxy: HAProxy and Serve's throughput settings
    metrics_port: int = 0  # 0: no port of its own, /metrics only
    metrics_host: str = "127.0.0.1"  # where that port listens; "node": this node's (the pod's) own address
    log: str = "info"
    max_body_bytes: int = 4 * 1024 * 1024
    api_keys_file: str | None = None  # see tpqwen.api.keys; without it the list in TPQWEN_API_KEYS, if any
    open_metrics: bool = False  # /metrics without a key where keys are in force
    insecure: bool = False  # take requests from other hosts without keys
    queue_timeout: float = 60.0  # seconds until the first step; 0, here and below: no such deadline
    first_token_timeout: float = 120.0
    total_timeout: float = 1800.0


@dataclass(frozen=True)
class Config:
    """Everything a user may say. Each part of the system gets its section, never the whole."""

    model: ModelOptions = field(default_factory=ModelOptions)
    parallel: ParallelOptions = field(default_factory=ParallelOptions)
    cache: CacheOptions = field(default_factory=CacheOptions)
    schedule: ScheduleOptions = field(default_factory=ScheduleOptions)
    server: ServerOptions = field(default_factory=ServerOptions)

    @staticmethod
    def load(options: Mapping[str, Any] | None = None, env: Mapping[str, str] | None = None) -> Config:
        """Options by flat name, strings or typed values; then the environment. Raises ConfigError."""
        given = {k: v for k, v in dict(options or {}).items() if v is not None}
        known = option_fields()
        for name in given:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                raise ConfigError(f"unknown option {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        source = os.environ if env is None else env
        for name in known:
            if name not in given and (text := source.get(f"TPQWEN_{name.upper()}")):
                given[name] = text
        sections: dict[str, dict[str, Any]] = {}
        for name, value in given.items():
            section, spec = known[name]
            sections.setdefault(section, {})[name] = _parsed(name, value, spec)
        config = Config(**{s: SECTIONS[s](**sections.get(s, {})) for s in SECTIONS})
        config.check()
        return config

    def check(self) -> None:
        """Every rule that needs no checkpoint. Raises ConfigError naming the option."""
        _one_of("tp", self.parallel.tp, TP_DEGREES)
        _one_of("device", self.parallel.device, ("auto", "cpu", "cuda"))
        _one_of("dtype", self.model.dtype, ("auto", "float32", "bfloat16", "float16"))
        _one_of("quantization", self.model.quantization, QUANTIZATIONS)
        _one_of("task", self.model.task, ("auto", "generate", "embed", "rerank"))
        _one_of("log", self.server.log, ("debug", "info", "warning", "error"))
        _one_of("ingress", self.server.ingress, INGRESSES)
        _one_of("depth", self.schedule.depth, (1, 2, 3, 4))
        _one_of("speculation", self.schedule.speculation, SPECULATIONS)
        if not 1 <= self.schedule.draft_tokens <= MAX_DRAFTS:
            raise ConfigError(f"draft_tokens must lie in 1..{MAX_DRAFTS}, not {self.schedule.draft_tokens}")
        if self.schedule.num_drafts and self.model.task in ("embed", "rerank"):
            text = f"speculation={self.schedule.speculation} drafts output tokens, and task={self.model.task} has none"
            raise ConfigError(text)
        for name in (
            "max_model_len",
            "block_size",
            "num_kv_blocks",
            "max_num_seqs",
            "max_batched_tokens",
            "threads",
        ):
            value = self.flat()[name]
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}")
        if not 0.0 < self.parallel.gpus_per_rank <= 1.0:
            raise ConfigError(f"gpus_per_rank must be above 0 and at most 1, not {self.parallel.gpus_per_rank}")
        if not 0.05 <= self.cache.memory_fraction <= 0.98:
            raise ConfigError(f"memory_fraction must lie in 0.05..0.98, not {self.cache.memory_fraction}")
        for name in ("queue_timeout", "first_token_timeout", "total_timeout"):
            if not 0 <= self.flat()[name] <= 86400:
                raise ConfigError(f"{name} must lie in 0..86400 seconds, not {self.flat()[name]}")
        if self.cache.block_size is not None and self.cache.block_size & (self.cache.block_size - 1):
            raise ConfigError(f"block_size must be a power of two, not {self.cache.block_size}")

    def flat(self) -> dict[str, Any]:
        """Option name -> value, as `load` takes them."""
        return {k: v for s in SECTIONS for k, v in dataclasses.asdict(getattr(self, s)).items()}


SECTIONS: dict[str, Any] = {
    "model": ModelOptions,
    "parallel": ParallelOptions,
    "cache": CacheOptions,
    "schedule": ScheduleOptions,
    "server": ServerOptions,
}


def option_fields() -> dict[str, tuple[str, Any]]:
    """Option name -> (section, type)."""
    return {k: (s, t) for s, cls in SECTIONS.items() for k, t in typing.get_type_hints(cls).items()}


def api_keys_text(env: Mapping[str, str] | None = None) -> str:
    """The list of API keys in TPQWEN_API_KEYS. No option: options are passed on and shown, keys are not."""
    return (os.environ if env is None else env).get("TPQWEN_API_KEYS", "")


def client_api_key(env: Mapping[str, str] | None = None) -> str:
    """The key with which our own clients call a server; OpenAI's variable."""
    return (os.environ if env is None else env).get("OPENAI_API_KEY", "")


def resolve_device(device: str) -> str:
    """auto -> cuda or cpu, without importing torch in processes that have no use for it."""
    if device != "auto":
        return device
    return "cuda" if Path("/dev/nvidiactl").exists() or Path("/dev/nvidia0").exists() else "cpu"


def _one_of(name: str, value: object, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(map(str, allowed))}, not {value!r}")


def _parsed(name: str, value: Any, spec: Any) -> Any:
    """One option's value as its type; strings come from the command line and the environment."""
    allowed = [
        t for t in (typing.get_args(spec) if isinstance(spec, types.UnionType) else (spec,)) if t is not type(None)
    ]
    kind = allowed[0]
    if isinstance(value, str) and kind is not str:
        return _from_text(name, value, kind)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ConfigError(f"{name} must be {kind.__name__}, not {value!r}")
    return value


def _from_text(name: str, text: str, kind: type) -> Any:
    if kind is bool:
        if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
            raise ConfigError(f"{name} must be true or false, not {text!r}")
        return text.lower() in ("true", "1", "yes")
    try:
        return kind(text)
    except ValueError:
        raise ConfigError(f"{name} must be {kind.__name__}, not {text!r}") from None
