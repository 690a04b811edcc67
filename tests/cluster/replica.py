"""Replicas that are small enough for a few of them on two cores, and Serve for them."""

from __future__ import annotations

import os
from typing import Any

from tests.cluster.clients import free_ports
from tests.cluster.processes import children_of, title, until

SMALL = {
    "device": "cpu",
    "dtype": "float32",
    "threads": "1",
    "max_model_len": "256",
    "max_num_seqs": "8",
    "max_batched_tokens": "128",
}


def replicas() -> set[int]:
    """Processes of replicas below this one."""
    return {pid for pid in children_of({os.getpid()}) if title(pid) == "tpqwen replica"}


def wait_for_replicas(count: int) -> set[int]:
    """So many, as soon as all have their title: Ray renames each once more when its constructor has ended."""
    found: list[set[int]] = []
    until(lambda: found.append(replicas()) or len(found[-1]) == count, f"{count} replicas with their title")
    return found[-1]


def start_serve() -> str:
    """Serve on a free port; its URL."""
    from ray import serve

    (port,) = free_ports(1)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    return f"http://127.0.0.1:{port}"


def bound(options: dict[str, str], **settings: Any) -> Any:
    """An application whose replicas have these options, with what Serve is to reserve for each. settings: Serve's."""
    from tpqwen import service
    from tpqwen.config import Config

    where = service.bundles(Config.load(options, {}))
    actor = {"num_cpus": where[0]["CPU"], "num_gpus": 0}
    deployment = service.Qwen3Server.options(ray_actor_options=actor, placement_group_bundles=where, **settings)
    return deployment.bind(options)
