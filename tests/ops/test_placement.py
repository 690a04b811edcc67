"""Where ranks go: GPUs of their own, or several on one."""

from __future__ import annotations

import pytest

from tpqwen.config import Config
from tpqwen.errors import ConfigError
from tpqwen.service import bundles


def config(**options: object) -> Config:
    return Config.load({"device": "cuda", **options}, {})


def test_each_rank_has_a_gpu_of_its_own_unless_told_otherwise():
    assert [b.get("GPU", 0) for b in bundles(config(tp=2))] == [0, 0, 1.0, 1.0]
    assert config(tp=4).parallel.num_gpus == 4


@pytest.mark.parametrize(
    ("tp", "share", "gpus"),
    [(2, "0.5", 1), (4, "0.5", 2), (4, "0.25", 1), (2, "0.6", 2), (8, "0.33", 3), (1, "0.2", 1)],
)
def test_ranks_share_gpus_but_none_spans_two(tp, share, gpus):
    shared = config(tp=tp, gpus_per_rank=share)
    assert [b["GPU"] for b in bundles(shared)[2:]] == [float(share)] * tp
    assert shared.parallel.num_gpus == gpus


@pytest.mark.parametrize("share", [0, -0.5, 1.5, "nan"])
def test_a_share_must_lie_above_nothing_and_at_most_at_one_gpu(share):
    with pytest.raises(ConfigError, match="gpus_per_rank must be above 0 and at most 1"):
        config(gpus_per_rank=share)
