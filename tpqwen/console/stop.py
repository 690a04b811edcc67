"""`tpqwen stop`: ends the application on the cluster at RAY_ADDRESS as `tpqwen serve` ends its own.

Every replica refuses new requests with 503 `draining` and lets the running ones end; Serve is told only then, since it
drops the route, and answers 404, as soon as it knows.
"""

from __future__ import annotations

import argparse
import os
from contextlib import suppress

import ray
from ray import serve
from rich.console import Console

from tpqwen.config import Config
from tpqwen.errors import ConfigError, EngineError

TAKES_CONFIG = False
APP = "tpqwen"
DRAIN_S = 90.0  # running requests may go on for so long
CALL_TIMEOUT_S = 30.0  # beyond that: for the replicas to answer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Whose end, and how soon."""
    parser.epilog = "RAY_ADDRESS names the cluster: auto, or HOST:PORT of its head."
    parser.add_argument("--app", default=APP, help=f"name of the application on Serve (default {APP})")
    help_s = f"seconds that running requests may take to end (default {DRAIN_S:g})"
    parser.add_argument("--grace", type=float, default=DRAIN_S, metavar="SECONDS", help=help_s)


def run(args: argparse.Namespace, _config: Config) -> int:
    """The command: returns when the application is gone. Raises ConfigError, EngineError."""
    if "RAY_ADDRESS" not in os.environ:
        raise ConfigError("RAY_ADDRESS must name the cluster, for instance RAY_ADDRESS=auto on one of its nodes")
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    try:
        ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False)
    except (ConnectionError, RuntimeError) as error:
        raise EngineError(f"no cluster at RAY_ADDRESS={os.environ['RAY_ADDRESS']}: {error}") from None
    try:
        if args.app not in serve.status().applications:
            raise ConfigError(f"Serve runs no application {args.app!r} there")
        console.print("draining: running requests may end")
        drain(args.app, args.grace)
        serve.delete(args.app)
    finally:
        ray.shutdown()
    console.print("stopped")
    return 0


def drain(app: str, grace_s: float) -> None:
    """New requests and /ready are answered 503 `draining` by every replica until the running ones have ended.

    After grace_s these end with an error. An application that is not running has nothing to drain; a replica that
    does not answer is waited for no longer than CALL_TIMEOUT_S beyond that, and left to Serve.
    """
    status = serve.status().applications.get(app)
    if status is None or str(status.status.value) != "RUNNING":
        return
    with suppress(TimeoutError):
        serve.get_app_handle(app).broadcast("drain", grace_s).results(timeout_s=grace_s + CALL_TIMEOUT_S)
