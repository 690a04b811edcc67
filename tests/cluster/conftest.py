"""One private Ray for all cluster tests, on loopback, with room for four ranks whatever the machine has."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tiny import tiny_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with 2 KV heads, so that tp=4 must replicate them."""
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"), num_key_value_heads=2)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """Started once; its sockets lie under a short path, since a socket's path must not be longer than 107 bytes."""
    import ray

    folder = tempfile.mkdtemp(prefix="tpq", dir="/tmp")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=100 * 1024 * 1024,
            _temp_dir=folder,
            _node_ip_address="127.0.0.1",
        )
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
