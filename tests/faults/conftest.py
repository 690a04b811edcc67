"""A Ray cluster of its own whose processes read fault plans, and a supervised engine on it for each module.

TPQWEN_FAULTS_DEVICE=cuda runs the same on GPUs. Ranks share them where there are fewer, which NCCL allows from 2.30 on
(NCCL_MULTI_RANK_GPU_ENABLE=1). TPQWEN_FAULTS_LOGS names a folder for the logs of all processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.private_ray import private_ray
from tests.faults.served import DEVICE, Faults, Served
from tpqwen.gpu import count_gpus

INJECTION = Path(__file__).with_name("injection")


@pytest.fixture(scope="package")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faults]:
    """Ray workers inherit the environment of the cluster's start, so one folder serves all plans."""
    folder = tmp_path_factory.mktemp("faults")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPQWEN_FAULTS", str(folder))
        patch.setenv("PYTHONPATH", f"{INJECTION}{os.pathsep}{os.environ['PYTHONPATH']}")
        with private_ray(count_gpus() if DEVICE == "cuda" else None, os.environ.get("TPQWEN_FAULTS_LOGS")):
            yield Faults(folder)


@pytest.fixture(scope="module")
def served(faults: Faults) -> Iterator[Served]:
    """tp=2 on the embedded model."""
    with Served(faults, tp=2) as found:
        yield found


@pytest.fixture(scope="module")
def served_by_four(faults: Faults) -> Iterator[Served]:
    """tp=4 on the embedded model."""
    with Served(faults, tp=4) as found:
        yield found
