"""`tpqwen generate MODEL --prompt ...`: continue prompts in this process; one prompt streams."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tpqwen.config import Config
from tpqwen.console.options import given_options
from tpqwen.console.sampling import add_sampling, given_sampling
from tpqwen.errors import ConfigError
from tpqwen.llm import LLM, RequestOutput
from tpqwen.request import SamplingParams


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command beside the model's own."""
    parser.add_argument("-p", "--prompt", action="append", default=[], metavar="TEXT", help="repeat it for several")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="one prompt per line; - is standard input")
    parser.add_argument("--json", action="store_true", help="one JSON object per answer")
    add_sampling(parser)


def run(args: argparse.Namespace, config: Config) -> int:
    """The command. Returns the exit code."""
    prompts = list(args.prompt)
    if args.prompts is not None:
        text = sys.stdin.read() if str(args.prompts) == "-" else args.prompts.read_text(encoding="utf-8")
        prompts += [line for line in text.splitlines() if line]
    if not prompts:
        raise ConfigError("nothing to generate from: give --prompt TEXT or --prompts FILE")
    options = {"model": config.model.model} | given_options(args)
    with LLM(**options) as llm:
        params = llm.sampling_params(**given_sampling(args))
        if len(prompts) == 1 and not args.json:
            _stream(llm, prompts[0], params)
            return 0
        for prompt, output in zip(prompts, llm.generate(prompts, params), strict=True):
            print(_json(prompt, output) if args.json else f"{prompt}{output.text}\n")
    return 0


def _stream(llm: LLM, prompt: str, params: SamplingParams) -> None:
    print(prompt, end="", flush=True)
    for piece in llm.stream(prompt, params):
        print(piece.text, end="", flush=True)
    print()


def _json(prompt: str, output: RequestOutput) -> str:
    usage = output.usage
    answer = {
        "prompt": prompt,
        "text": output.text,
        "token_ids": output.token_ids,
        "finish_reason": output.finish_reason,
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "cached_tokens": usage.cached_tokens,
        },
    }
    return json.dumps(answer, ensure_ascii=False)
