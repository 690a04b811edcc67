"""Branches of a captured graph: complete after `join`, and nothing at all where no graph is captured."""

from __future__ import annotations

import pytest
import torch

from tpqwen.kernels import branch


def test_outside_a_capture_everything_stays_in_turn() -> None:
    aside = branch.fork(torch.device("cpu"))
    assert aside is None
    with torch.cuda.stream(aside):
        x = torch.ones(2) + 1
    branch.join(aside)
    assert x.tolist() == [2, 2]


@pytest.mark.gpu
@pytest.mark.parametrize("slow_aside", [True, False])
def test_what_follows_a_join_sees_both_branches(slow_aside: bool) -> None:
    device = torch.device("cuda")
    source, numbers = torch.eye(2048, device=device), torch.zeros(2048, 2048, device=device)
    assert branch.fork(device) is None

    def long_way(x: torch.Tensor) -> torch.Tensor:
        for _ in range(20):
            x = x @ source
        return x

    def both() -> torch.Tensor:
        x, y = numbers + 1, numbers + 2
        for _ in range(3):
            aside = branch.fork(device)
            with torch.cuda.stream(aside):
                y = (long_way(y) if slow_aside else y) + 1
            x = (x if slow_aside else long_way(x)) + 1
            branch.join(aside)
            x, y = x + y, x - y
        return x

    expected = both()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = both()
    for value in (0.0, 1.0, 2.0):
        numbers.fill_(value)
        graph.replay()
        assert torch.equal(result, both())
    numbers.zero_()
    graph.replay()
    assert torch.equal(result, expected)
