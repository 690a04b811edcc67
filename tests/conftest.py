"""Settings of the whole suite: no network, no usage statistics, one computing thread per process."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_DISABLE_USAGE_STATS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("PYTHONPATH", os.getcwd())
if not os.path.exists("/dev/nvidia0"):
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before any import of one


def pytest_configure(config: pytest.Config) -> None:
    if config.pluginmanager.hasplugin("xdist"):
        from tests import workers

        config.pluginmanager.register(workers)


@pytest.fixture(autouse=True)
def _same_loggers() -> Iterator[None]:
    """Commands that run in the test's process configure ours, with a stream that ends with the test and where other
    tests' caplog hears nothing."""
    log = logging.getLogger("tpqwen")
    before = log.handlers[:], log.level, log.propagate
    yield
    log.handlers[:], level, log.propagate = before
    log.setLevel(level)  # forgets what it knows of levels, too
