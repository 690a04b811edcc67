"""A private Ray on loopback with room for four ranks whatever the machine has."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def private_ray(num_gpus: int | None = None, keep_logs: str | None = None) -> Iterator[None]:
    """Its sockets lie under a short path, since a socket's path must not be longer than 107 bytes.

    keep_logs: where its processes' logs are copied at the end.
    """
    import ray

    folder = tempfile.mkdtemp(prefix="tpq", dir="/tmp")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.init(
            address="local",
            num_cpus=2,
            num_gpus=num_gpus,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=100 * 1024 * 1024,
            _temp_dir=folder,
            _node_ip_address="127.0.0.1",
        )
    try:
        yield
    finally:
        ray.shutdown()
        if keep_logs:
            shutil.copytree(f"{folder}/session_latest/logs", keep_logs, dirs_exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
