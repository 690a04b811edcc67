"""`tpqwen stop`: ends an application on a running Ray cluster, once its running requests have ended."""

from __future__ import annotations

import argparse
import io
import logging
import os
from contextlib import redirect_stdout

import ray
from rich.console import Console

from tpqwen.config import Config
from tpqwen.console.signals import Interrupts
from tpqwen.errors import ConfigError
from tpqwen.stopping import GRACE_S, connect, stop

TAKES_CONFIG = False  # the application has been told when it was started


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which application, how long its requests may take, and what becomes of Serve."""
    parser.epilog = "An interrupt (Ctrl-C, SIGTERM) before Serve is told leaves the application serving as before."
    address = os.environ.get("RAY_ADDRESS", "auto")
    parser.add_argument("--address", default=address, help="the cluster: HOST:PORT of its head (RAY_ADDRESS, or auto)")
    parser.add_argument("--name", help="the application's name on Serve, where more than one of tpqwen runs")
    help_s = f"how long running requests may go on before they end with an error ({GRACE_S:g})"
    parser.add_argument("--timeout", type=float, default=GRACE_S, metavar="SECONDS", help=help_s)
    keep = "leave Serve running, whose port answers 404 then, also when nothing else runs on it"
    parser.add_argument("--keep-serve", action="store_true", help=keep)


def run(args: argparse.Namespace, _config: Config) -> int:
    """The command: returns when the application is gone. Raises ConfigError, EngineError."""
    if not args.timeout >= 0:
        raise ConfigError("--timeout must be 0 or more seconds")
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # it warns of every replica that is slow to answer
    with Interrupts() as interrupts:
        try:
            connect(args.address)
            interrupts.take()  # again: Ray has put its own handlers in place
            with redirect_stdout(io.StringIO()):  # Ray tells it that Serve's controller, which has ended, is not there
                stop(args.name, timeout_s=args.timeout, keep_serve=args.keep_serve, say=console.print)
        finally:
            interrupts.ignore()
            ray.shutdown()
    return 0
