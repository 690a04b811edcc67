"""A checkpoint's config.json as a typed value, with every refusal that needs no weights. No torch here.

Reading rules: explicit fields only. head_dim is never computed, and a rope_theta that is missing is an error, because
library defaults differ from the published checkpoints.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from tpqwen.errors import ConfigError

DEFAULT_KEYS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
DTYPES = ("float32", "bfloat16", "float16")


class Task(StrEnum):
    """What a checkpoint is for."""

    GENERATE = "generate"
    EMBED = "embed"
    RERANK = "rerank"


@dataclass(frozen=True)
class ModelConfig:
    """Dense Qwen3. Names as in config.json; eos_token_ids joins config and generation_config, in that order."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    dtype: str
    eos_token_ids: tuple[int, ...]
    generation_defaults: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def from_folder(folder: str | Path) -> ModelConfig:
        """Read config.json and, when it is there, generation_config.json. Raises ConfigError naming the field."""
        raw = _read(Path(folder) / "config.json")
        _refuse(raw, Path(folder))
        path = Path(folder) / "generation_config.json"
        generation = _read(path) if path.exists() else {}
        ends = [*_ids(raw.get("eos_token_id")), *_ids(generation.get("eos_token_id"))]
        config = ModelConfig(
            **{k: _number(raw, k, int) for k in _INT_FIELDS},
            rms_norm_eps=_number(raw, "rms_norm_eps", float),
            rope_theta=_rope_theta(raw),
            # an embedding checkpoint may come without a head; its logits are never looked at
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)) or pools_last_token(Path(folder)),
            dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "bfloat16").removeprefix("torch."),
            eos_token_ids=tuple(dict.fromkeys(ends)),
            generation_defaults={k: generation[k] for k in DEFAULT_KEYS if generation.get(k) is not None},
        )
        config._check()
        return config

    def _check(self) -> None:
        """Rules between fields that hold for every TP degree."""
        q, kv = self.num_attention_heads, self.num_key_value_heads
        if q % kv:
            raise ConfigError(
                f"config.json: {q} query heads (num_attention_heads) are no multiple of {kv} key/value heads"
            )
        if self.head_dim % 2:
            raise ConfigError(f"config.json: head_dim {self.head_dim} is odd, rotary embeddings need pairs")
        if self.dtype not in DTYPES:
            raise ConfigError(f"config.json: dtype {self.dtype!r} is none of {', '.join(DTYPES)}")

    def local_kv_heads(self, tp: int) -> int:
        """Key/value heads that one rank holds; at least one, replicated when there are more ranks than heads."""
        return max(1, self.num_key_value_heads // tp)

    def kv_bytes_per_token(self, dtype_bytes: int, tp: int = 1) -> int:
        """Bytes of keys and values of one token on one rank."""
        return 2 * self.num_hidden_layers * self.local_kv_heads(tp) * self.head_dim * dtype_bytes

    @property
    def num_parameters(self) -> int:
        """Weights in all, embeddings included."""
        h, d = self.hidden_size, self.head_dim
        attention = h * d * 2 * (self.num_attention_heads + self.num_key_value_heads) + 2 * d
        layer = attention + 3 * h * self.intermediate_size + 2 * h
        return self.num_hidden_layers * layer + self.vocab_size * h * (1 if self.tie_word_embeddings else 2) + h


_INT_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)


def check_parallel(config: ModelConfig, tp: int) -> None:
    """Whether tp ranks can share this model. Raises ConfigError naming both numbers."""
    q, kv, inner = config.num_attention_heads, config.num_key_value_heads, config.intermediate_size
    if q % tp:
        raise ConfigError(f"tp {tp} does not divide the {q} query heads")
    if kv % tp and tp % kv:
        raise ConfigError(f"tp {tp} and {kv} key/value heads: neither divides the other")
    if inner % tp:
        raise ConfigError(f"tp {tp} does not divide intermediate_size {inner}")


def detect_task(folder: str | Path, name: str, given: str = "auto") -> Task:
    """The given task, or what the files of sentence-transformers and the model's name say. Raises ConfigError."""
    words = name.lower()
    if given != "auto":
        return Task(given)
    if "reranker" in words:
        return Task.RERANK
    return Task.EMBED if "embedding" in words or pools_last_token(Path(folder)) else Task.GENERATE


def pools_last_token(folder: Path) -> bool:
    """Whether sentence-transformers' files say that this is an embedding checkpoint. Raises ConfigError for one that
    pools in another way."""
    path = folder / "1_Pooling" / "config.json"
    if not (folder / "modules.json").is_file() or not path.is_file():
        return False
    if not _read(path).get("pooling_mode_lasttoken"):
        raise ConfigError(f"{path}: only pooling_mode_lasttoken is supported, which is what Qwen3-Embedding has")
    return True


def count_token_ids(folder: str | Path, vocab_size: int) -> int:
    """How many ids the tokenizer knows: rows of the embedding above it are padding and must never be drawn.

    vocab_size where the folder has no tokenizer.json.
    """
    path = Path(folder) / "tokenizer.json"
    if not path.exists():
        return vocab_size
    raw = _read(path)
    added = [t["id"] for t in raw.get("added_tokens", [])]
    return min(vocab_size, 1 + max([*raw.get("model", {}).get("vocab", {}).values(), *added], default=vocab_size - 1))


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} is not a JSON object")
    return data


def _refuse(raw: dict[str, Any], folder: Path) -> None:
    """What this server does not do, named."""
    kind = raw.get("model_type")
    if kind == "qwen3_moe":
        raise ConfigError(f"{folder}: model_type 'qwen3_moe' is not supported yet; dense Qwen3 is")
    if kind != "qwen3":
        raise ConfigError(f"{folder}: model_type {kind!r} is not Qwen3; this server runs model_type 'qwen3' only")
    refusals = {
        "attention_bias": bool(raw.get("attention_bias", False)),
        "use_sliding_window": bool(raw.get("use_sliding_window", False)),
        "hidden_act": raw.get("hidden_act", "silu") != "silu",
    }
    for name, refused in refusals.items():
        if refused:
            raise ConfigError(f"{folder}: {name} {raw[name]!r} is not supported")
    for name in ("rope_parameters", "rope_scaling"):  # either may carry it; neither may be overlooked
        rope = _section(raw, name)
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type != "default":
            raise ConfigError(f"{folder}: {name} with rope_type {rope_type!r} is not supported yet; remove it")
    if quantization := raw.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ConfigError(f"{folder}: quant_method {method!r} is not supported yet; use the unquantized checkpoint")


def _section(raw: dict[str, Any], name: str) -> dict[str, Any]:
    """A nested object; empty when it is missing or null."""
    value = raw.get(name) or {}
    if not isinstance(value, dict):
        raise ConfigError(f"config.json: {name} must be an object, not {value!r}")
    return value


def _number(raw: dict[str, Any], name: str, kind: type) -> Any:
    value: Any = raw.get(name)
    ok = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    if not ok or not value > 0:
        raise ConfigError(f"config.json: {name} must be a positive {kind.__name__}, not {value!r}")
    return kind(value)


def _rope_theta(raw: dict[str, Any]) -> float:
    rope = _section(raw, "rope_parameters")
    if "rope_theta" not in raw and "rope_theta" not in rope:
        raise ConfigError("config.json has no rope_theta; it differs between Qwen3 checkpoints, so there is no default")
    theta: float = _number(raw if "rope_theta" in raw else rope, "rope_theta", float)
    return theta


def _ids(value: Any) -> list[int]:
    if value is None:
        return []
    ids: list[int] = value if isinstance(value, list) else [value]
    if not all(type(v) is int for v in ids):
        raise ConfigError(f"eos_token_id must be a token id or a list of them, not {value!r}")
    return ids
