"""Sampling options shared by `tpqwen generate` and `tpqwen chat`; what is not given is the model's own default."""

from __future__ import annotations

import argparse
from typing import Any


def add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling (default: what the model's generation_config says)")
    group.add_argument("--max-tokens", type=int, metavar="N", help="longest answer, tokens")
    group.add_argument("--temperature", type=float, metavar="X", help="0 always takes the likeliest token")
    group.add_argument("--top-p", type=float, metavar="X")
    group.add_argument("--top-k", type=int, metavar="N")
    group.add_argument("--min-p", type=float, metavar="X")
    group.add_argument("--seed", type=int, metavar="N", help="same seed, same answer")


def given_sampling(args: argparse.Namespace) -> dict[str, Any]:
    """SamplingParams fields that stand on the command line."""
    names = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed")
    return {name: value for name in names if (value := getattr(args, name)) is not None}
