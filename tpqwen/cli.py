"""The command `tpqwen`. Each command is a module with `add_arguments(parser)` and `run(args, config) -> exit code`.

Only the module of the chosen command is imported, so `tpqwen --help` and a mistyped option answer at once.
Exit codes: 0 done, 1 the engine failed, 2 the command line or the model cannot work, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

from tpqwen import __version__, logs
from tpqwen.console.options import add_options, load_config
from tpqwen.console.ray_settings import set_ray_defaults
from tpqwen.errors import ConfigError, TpqwenError

ENGINE_SECTIONS = ("model", "parallel", "cache", "schedule")


@dataclass(frozen=True)
class Command:
    """One command: the module that does it, or one module for each kind (the word after the command)."""

    help: str
    module: str = ""
    kinds: dict[str, str] = field(default_factory=dict)
    sections: tuple[str, ...] = ENGINE_SECTIONS


COMMANDS = {
    "serve": Command("serve a model over HTTP", "tpqwen.console.serve", sections=(*ENGINE_SECTIONS, "server")),
    "stop": Command("end an application on a running Ray cluster, its requests first", "tpqwen.console.stop"),
    "generate": Command("continue prompts and print the results", "tpqwen.console.generate"),
    "chat": Command("talk to a model in the terminal", "tpqwen.console.chat"),
    "compare": Command("measure naive, cached and batched generation", "tpqwen.bench.compare"),
    "bench": Command(
        "measure",
        kinds={
            "offline": "tpqwen.bench.offline",
            "kernels": "tpqwen.bench.kernels",
            "serve": "tpqwen.bench.serve",
        },
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the process's exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    chosen = [word for word in words if not word.startswith("-")][:2]
    if chosen[:1] == ["version"] or words[:1] == ["--version"]:
        print(_versions())
        return 0
    set_ray_defaults(os.environ, words)
    module = _module(chosen)
    args = _parser(module, chosen).parse_args(words)
    if module is None:
        return 2
    try:
        config = load_config(args)
        logs.configure(config.server.log, "cli")
        return int(module.run(args, config))
    except TpqwenError as error:
        print(f"tpqwen: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output left, as in `tpqwen generate ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _module(chosen: list[str]) -> ModuleType | None:
    """The chosen command's module, None when the words choose none."""
    command = COMMANDS.get(chosen[0]) if chosen else None
    if command is None:
        return None
    name = command.kinds.get(chosen[1], "") if command.kinds and len(chosen) > 1 else command.module
    return import_module(name) if name else None


def _parser(module: ModuleType | None, chosen: list[str]) -> argparse.ArgumentParser:
    """The whole command line; a command's own options are there only when it is the chosen one."""
    parser = argparse.ArgumentParser(prog="tpqwen", description="Serve Qwen3 on your own GPUs, or on a CPU.")
    parser.add_argument("--version", action="store_true", help="print versions and stop")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        sub = commands.add_parser(name, help=command.help, description=command.help)
        if command.kinds:
            sub.add_argument(
                "kind", choices=list(command.kinds), help="the engine alone, its kernels, or a server by its URL"
            )
        if [name] != chosen[:1] or getattr(module, "TAKES_CONFIG", True):
            add_options(sub, command.sections)
        if module is not None and name == chosen[0]:
            module.add_arguments(sub)
    commands.add_parser("version", help="print versions")
    return parser


def _versions() -> str:
    """tpqwen and what it stands on, one per line, without importing any of it."""
    lines = [f"tpqwen {__version__}", f"python {sys.version.split()[0]}"]
    for name in ("torch", "triton", "ray", "transformers"):
        try:
            lines.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            lines.append(f"{name} not installed")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
