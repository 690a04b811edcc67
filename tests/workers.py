"""Which tests pytest's workers (pytest-xdist) keep together."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

source = cache(Path.read_text)


class OneClusterAtATime(LoadScopeScheduling):
    """The tests of a file stay on one worker, and so do all that start a Ray cluster: two cores bear one of them."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "clusters" if "pytest.mark.ray" in source(self.config.rootpath / file) else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> OneClusterAtATime:
    return OneClusterAtATime(config, log)
