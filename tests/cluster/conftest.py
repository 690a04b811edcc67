"""One private Ray for all cluster tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.private_ray import private_ray
from tests.tiny import tiny_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with 2 KV heads, so that tp=4 must replicate them."""
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"), num_key_value_heads=2)


@pytest.fixture(scope="package")
def ray_cluster() -> Iterator[None]:
    """Started once for this folder; other folders have clusters of their own."""
    with private_ray():
        yield
