"""How many blocks fit: alone on a device, beside strangers, and beside other ranks of the same group."""

from __future__ import annotations

import pytest
import torch

from tpqwen.errors import ConfigError
from tpqwen.worker.kv_cache import blocks_on_gpu

TOTAL, RESERVED = 1000, 100


@pytest.fixture(autouse=True)
def device(monkeypatch):
    """300 of 1000 bytes are held: 100 by this process, 200 by others."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (TOTAL - 300, TOTAL))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: RESERVED)


def test_what_strangers_hold_counts_against_a_rank_with_its_own_gpu():
    assert blocks_on_gpu(10, 4, 0.9, 100) == (900 - 100 - 200) // 10


def test_ranks_that_share_a_gpu_take_their_part_whatever_the_others_have_loaded():
    assert blocks_on_gpu(10, 4, 0.9, 100, 0.5) == (450 - 100) // 10


def test_a_rank_without_room_for_one_sequence_is_refused_with_the_numbers():
    with pytest.raises(ConfigError, match="is left for the KV cache but one sequence of full length needs"):
        blocks_on_gpu(10, 40, 0.9, 100, 0.5)
    with pytest.raises(ConfigError, match=r"^0\.0 of .* is left for the KV cache \(other processes hold .*\) but one"):
        blocks_on_gpu(10, 4, 0.9, 750)
