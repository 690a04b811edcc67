"""The exchange kernel between two processes that write into each other's memory, in Triton's interpreter: who comes
first, and by how much, is up to the machine. On GPUs test_peers.py does the same over NVLink."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

TURNS, LAST = 60, 25  # exchanges, and those of a rank that dies
MAX_BYTES = 4096
CALLED_OFF = 7  # exit code
STEP_S = 60

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")


def mapped(path: Path, *shape: int, dtype: str = "int64") -> torch.Tensor:
    """Memory that every process with this path shares."""
    return torch.from_numpy(np.memmap(path, dtype, "r+" if path.exists() else "w+", shape=shape))


def rank_main(rank: int, folder: Path, turns: int) -> None:
    """Exchange so many times, then die if that is early; wait for what does not come until told to stop."""
    from tests.device.conftest import _interpret_kernels

    _interpret_kernels()
    from tpqwen.kernels import exchange, mailbox, reference

    shape = mailbox.inbox_shape(2, MAX_BYTES)
    inboxes = [mapped(folder / f"inbox{r}", *shape) for r in range(2)]
    stop = mapped(folder / "stop", 1, dtype="int32")
    addresses = torch.tensor([inbox.data_ptr() for inbox in inboxes])
    counts, halted = torch.zeros(shape[2], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    box = mailbox.Mailbox(rank, inboxes[rank], addresses, counts, halted, stop)
    together, alone = random.Random(1), random.Random(rank)
    for turn in range(turns):
        rows = together.choice((1, 2, 5, 8))
        parts = [torch.randn(rows, 96, generator=torch.Generator().manual_seed(2 * turn + r)) for r in range(2)]
        time.sleep(alone.choice((0.0, 0.0, 0.004)))
        if turn % 3:
            assert torch.equal(exchange.gather(box, parts[rank]), torch.stack(parts)) or stop.item()
        else:
            residual = torch.ones(rows, 96)
            out = exchange.add_up(box, parts[rank].clone(), residual)
            assert torch.equal(out, reference.add_up(parts, residual)) or stop.item()
        if stop.item():
            os._exit(CALLED_OFF)
    if turns < TURNS:
        os.kill(os.getpid(), signal.SIGKILL)


def processes(folder: Path, turns: tuple[int, int]) -> list[multiprocessing.process.BaseProcess]:
    from tpqwen.kernels.mailbox import inbox_shape

    for name in ("inbox0", "inbox1"):
        mapped(folder / name, *inbox_shape(2, MAX_BYTES))
    mapped(folder / "stop", 1, dtype="int32")
    context = multiprocessing.get_context("spawn")
    made = [context.Process(target=rank_main, args=(r, folder, turns[r]), daemon=True) for r in range(2)]
    for process in made:
        process.start()
    return made


def test_two_processes_exchange_at_their_own_pace(tmp_path: Path) -> None:
    ranks = processes(tmp_path, (TURNS, TURNS))
    for rank in ranks:
        rank.join(STEP_S)
    assert [rank.exitcode for rank in ranks] == [0, 0]


def test_a_process_whose_peer_is_killed_waits_until_it_is_told_to_stop(tmp_path: Path) -> None:
    survivor, victim = processes(tmp_path, (TURNS, LAST))
    victim.join(STEP_S)
    assert victim.exitcode == -signal.SIGKILL
    survivor.join(0.5)
    assert survivor.exitcode is None, "it waits"
    mapped(tmp_path / "stop", 1, dtype="int32")[0] = 1
    survivor.join(STEP_S)
    assert survivor.exitcode == CALLED_OFF
