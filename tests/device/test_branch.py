"""Branches of a captured graph: complete after `join`, and nothing at all where no graph is captured."""

from __future__ import annotations

import pytest
import torch

from tpqwen.kernels import branch
from tpqwen.kernels.gemm import linear_add
from tpqwen.kernels.gemm_table import choose
from tpqwen.kernels.norm import rms_norm


def test_outside_a_capture_everything_stays_in_turn() -> None:
    aside = branch.fork(torch.device("cpu"))
    assert aside is None
    with torch.cuda.stream(aside):
        x = torch.ones(2) + 1
    branch.join(aside)
    assert x.tolist() == [2, 2]


@pytest.mark.gpu
@pytest.mark.parametrize("slow_aside", [True, False])
def test_a_kernel_behind_a_join_waits_for_both_branches(slow_aside: bool) -> None:
    """All of them are launched with PDL: rule 4 of launch.py."""
    device = torch.device("cuda")
    big = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    weight, start, other = (torch.randn(rows, 2048, device=device, dtype=torch.bfloat16) for rows in (2048, 8, 8))
    scale = torch.ones(2048, device=device, dtype=torch.bfloat16)
    assert branch.fork(device) is None
    assert choose("add", len(start), *weight.shape).path == "dot"

    def normed(x: torch.Tensor, slowly: bool) -> torch.Tensor:
        for _ in range(5 if slowly else 0):
            torch.mm(big, big)
        return rms_norm(x, scale, 1e-6)

    def run() -> torch.Tensor:
        x, residual = start, other
        for _ in range(4):
            aside = branch.fork(device)
            with torch.cuda.stream(aside):
                y = normed(residual, slow_aside)
            x = normed(x, not slow_aside)
            branch.join(aside)
            residual = linear_add(x, weight, y)
        return residual

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    for _ in range(10):
        start.normal_()
        other.normal_()
        graph.replay()
        assert torch.equal(result, run())
