"""The options of `Config` as command-line arguments: one table of help texts, no option that Config does not have."""

from __future__ import annotations

import argparse
import types
import typing
from typing import Any

from tpqwen.config import Config, ScheduleOptions, ServerOptions, option_fields

HELP = {
    "model": "folder in Hugging Face format or Hub id (default: the small embedded model)",
    "revision": "branch, tag or commit of a Hub id",
    "served_model_name": "name that clients use (default: the model as given; tpqwen-demo for the embedded one)",
    "dtype": "auto, float32, bfloat16 or float16",
    "quantization": "none, or int8: weights of the layers in half the memory (default none)",
    "deterministic": "results do not depend on the batch or on recomputation, bit by bit; slower (default off)",
    "max_model_len": "longest prompt plus output, tokens (default: what the checkpoint allows)",
    "random_weights": "draw weights from the model's config instead of loading them",
    "verify": "check the weights' SHA-256 first: true, false (default: where the folder has a list, as SHA256SUMS)",
    "task": "auto, generate, embed or rerank (default: told from the checkpoint)",
    "tp": "tensor-parallel ranks: 1, 2, 4 or 8",
    "device": "auto, cpu or cuda",
    "gpus_per_rank": "share of a GPU for each rank, below 1 to test several ranks on one (default 1)",
    "interface": "network interface of rank-to-rank traffic (default: loopback on one node)",
    "threads": "CPU threads of each rank (default: an equal share)",
    "warm_spare": "keep one process started for the next rank that is lost (default off)",
    "block_size": "tokens in one KV cache block (default: by device)",
    "num_kv_blocks": "KV cache blocks (default: what memory allows)",
    "memory_fraction": "share of the device's memory to use, weights included (default 0.90)",
    "prefix_cache": "reuse the KV blocks of common prompt beginnings (default on)",
    "max_num_seqs": "sequences in one step (default: by device)",
    "max_batched_tokens": "tokens in one step (default: by device)",
    "depth": f"steps in flight (default {ScheduleOptions.depth})",
    "max_waiting": f"waiting sequences before 429 (default {ScheduleOptions.max_waiting})",
    "max_waiting_tokens": f"tokens beyond the free pages before 429 (default {ScheduleOptions.max_waiting_tokens})",
    "speculation": "off, or ngram: draft tokens from what a sequence repeats of itself, where that pays (default off)",
    "draft_tokens": f"tokens drafted for a row in one step (default {ScheduleOptions.draft_tokens})",
    "host": f"address to listen on (default {ServerOptions.host}); tpqwen serve only",
    "port": f"port to listen on (default {ServerOptions.port}); tpqwen serve only",
    "ingress": "serve (Serve's own proxy) or haproxy: cheaper per token, more ports (default serve); tpqwen serve only",
    "metrics_port": "a second port for /metrics alone (default: none)",
    "metrics_host": "address it listens on, or node for this node's own (default 127.0.0.1)",
    "log": "debug, info, warning or error; also TPQWEN_LOG (default info)",
    "max_body_bytes": f"longest request body (default {ServerOptions.max_body_bytes})",
    "api_keys_file": "list of API keys, one a line, reloaded when it changes (default: TPQWEN_API_KEYS, else no keys)",
    "open_metrics": "answer /metrics without a key",
    "insecure": "listen on other addresses than loopback without keys",
    "queue_timeout": "seconds until a request's first step, else 503; 0: no limit (default 60)",
    "first_token_timeout": "seconds until its first token, else 504 (default 120)",
    "total_timeout": "seconds until its end (default 1800)",
}


def add_options(parser: argparse.ArgumentParser, sections: tuple[str, ...]) -> None:
    """Every option of these sections of Config; the model is positional, -v stands for --log debug."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help=HELP["model"])
    group = parser.add_argument_group("options (each is also an environment variable, TPQWEN_<OPTION>)")
    for name, (section, spec) in option_fields().items():
        if name == "model" or (section not in sections and name != "log"):
            continue
        flag = "--" + name.replace("_", "-")
        if spec is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=HELP[name])
        else:
            group.add_argument(flag, metavar=_metavar(spec), help=HELP[name])
    parser.add_argument("-v", "--verbose", action="store_const", const="debug", dest="log", help="same as --log debug")


def given_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options that stand on the command line, by Config's names."""
    return {name: value for name in option_fields() if (value := getattr(args, name, None)) is not None}


def load_config(args: argparse.Namespace) -> Config:
    """Config from the command line and the environment. Raises ConfigError."""
    return Config.load(given_options(args))


def _metavar(spec: Any) -> str:
    kinds = typing.get_args(spec) if isinstance(spec, types.UnionType) else (spec,)
    return {int: "N", float: "X"}.get(kinds[0], "TEXT")
