"""One rank of the GPU test in test_peers.py, as a process with a GPU of its own.

python -m tests.device.peer_rank RANK SIZE PORT EPOCH. In epoch 1 the last rank is killed, by itself, while it waits for
the others; these wait for it, are called off, and join epoch 2 with its successor.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import random
import signal
import sys
import threading
import time
from datetime import timedelta

import torch
from torch._C._distributed_c10d import TCPStore
from torch.distributed.distributed_c10d import PrefixStore, Store

from tpqwen.kernels import reference
from tpqwen.parallel.group import TPGroup

HIDDEN = 1024
ROWS = (1, 1, 2, 3, 8, 17, 32, 64, 100, 700)  # the last ones are too many for peers
EAGER, REPLAYS = 3000, 500
TIMEOUT_S = 60.0


def numbers(seed: int, rows: int, rank: int, dtype: torch.dtype) -> torch.Tensor:
    """The same in every process."""
    generator = torch.Generator("cuda").manual_seed(64 * seed + rank)
    return torch.randn(rows, HIDDEN, device="cuda", generator=generator).to(dtype)


def close(a: torch.Tensor, b: torch.Tensor, exact: bool) -> torch.Tensor:
    """A bool on the device."""
    wide = a.double(), b.double()
    return (a == b).all() if exact else torch.isclose(*wide, rtol=0.05, atol=0.1).all()


def exchange_eagerly(group: TPGroup) -> None:
    """Sums with and without residuals and gathers, of random sizes, some of them NCCL's."""
    draw, right = random.Random(group.size), torch.ones((), dtype=torch.bool, device="cuda")
    for turn in range(EAGER):
        rows, dtype = draw.choice(ROWS), draw.choice((torch.bfloat16, torch.float32))
        parts = [numbers(turn, rows, rank, dtype) for rank in range(group.size)]
        residual = numbers(turn, rows, 63, dtype) if turn % 3 else None
        expected, mine = reference.add_up(parts, residual), parts[group.rank].clone()
        exact = group._peers is not None and group._peers.takes(mine, summed=True)
        out = group.all_reduce(mine) if residual is None else group.add_reduced(mine, residual)
        right &= close(out, expected, exact)
        gathered = group.all_gather(parts[group.rank][:, :2].double())
        right &= (gathered == torch.stack([p[:, :2].double() for p in parts])).all()
    assert bool(right), "some exchange was wrong"


def exchange_in_a_graph(group: TPGroup) -> None:
    """The same graph again and again, between other exchanges."""
    inputs = [torch.zeros(rows, HIDDEN, device="cuda", dtype=torch.bfloat16) for rows in (1, 8, 8, 64, 1, 128, 3)]
    graph, outs = capture(group, inputs)
    right = torch.ones((), dtype=torch.bool, device="cuda")
    for turn in range(REPLAYS):
        parts = [[numbers(8 * turn + i, len(x), r, x.dtype) for r in range(group.size)] for i, x in enumerate(inputs)]
        for x, each in zip(inputs, parts, strict=True):
            x.copy_(each[group.rank])
        graph.replay()
        for out, each in zip(outs, parts, strict=True):
            right &= (out == reference.add_up([*each])).all()
        if turn % 7 == 0:
            group.all_reduce(torch.ones(5, HIDDEN, device="cuda"))
    assert bool(right), "some replay was wrong"


def capture(group: TPGroup, inputs: list[torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]:
    """A graph of the inputs' sums, with residuals of zero."""

    def run() -> list[torch.Tensor]:
        return [group.add_reduced(x.clone(), torch.zeros_like(x)) for x in inputs]

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = run()
    return graph, outs


def lose_a_peer(group: TPGroup) -> None:
    """The last rank dies waiting; another one gets out when it is called off, and leaves."""
    graph, _ = capture(group, [torch.zeros(8, HIDDEN, device="cuda")] * 20)
    group.barrier()
    torch.cuda.synchronize()
    if group.rank == group.size - 1:
        graph.replay()
        time.sleep(0.5)  # so that it surely waits; were it not so, the test would prove a little less
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1.0)
    graph.replay()
    done = torch.cuda.Event()
    done.record()
    threading.Timer(0.3, lambda: setattr(group, "called_off", True)).start()
    try:
        group.wait_until(done.query)
    except ConnectionError:
        begin = time.monotonic()
        torch.cuda.synchronize()
        print(f"rank {group.rank} out after {1e3 * (time.monotonic() - begin):.1f} ms", flush=True)
    else:
        raise AssertionError("nobody was waited for")
    del graph
    gc.collect()
    group.abort()
    ones = torch.ones(256, 256, device="cuda")
    assert bool((ones @ ones == 256).all()), "the survivor computes no more"


def join(group: TPGroup, store: Store, epoch: int) -> None:
    group.join(store, epoch, "cuda", TIMEOUT_S)
    assert group._peers is not None and group._peers.takes(torch.ones(8), summed=True), "these GPUs are no peers"


def main(rank: int, size: int, port: int, epoch: int) -> None:
    faulthandler.dump_traceback_later(100, exit=True)
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    store = PrefixStore("s", TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=TIMEOUT_S)))
    group = TPGroup(rank, size, None)
    join(group, store, epoch)
    exchange_eagerly(group)
    exchange_in_a_graph(group)
    if epoch == 1:
        lose_a_peer(group)
        join(group, store, 2)
        exchange_eagerly(group)
        exchange_in_a_graph(group)
    group.leave()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
