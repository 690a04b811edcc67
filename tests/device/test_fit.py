"""What does not fit into memory is refused in figures: before it is tried, or when an allocation fails."""

from __future__ import annotations

import pytest
import torch

from tests.tiny import tiny_checkpoint
from tpqwen import fit
from tpqwen.config import Config
from tpqwen.errors import ConfigError
from tpqwen.executor.local import LocalExecutor
from tpqwen.fit import GIB, check_host_memory, refused_if_too_large
from tpqwen.model import weights
from tpqwen.model.config import ModelConfig
from tpqwen.worker import kv_cache

TOO_MANY = 10**12  # blocks: petabytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def config(folder, **options):
    return Config.load({"model": str(folder), "device": "cpu", "dtype": "float32"} | options, {})


def test_caches_that_the_machine_cannot_hold_are_refused_with_both_figures(folder):
    model = ModelConfig.from_folder(folder)
    check_host_memory(config(folder), model)
    check_host_memory(config(folder, device="cuda", num_kv_blocks=TOO_MANY), model)  # a GPU's, which nobody knows here
    with pytest.raises(ConfigError, match=r"KV cache \d+\.\d GiB, and this machine has \d+\.\d GiB .*num_kv_blocks"):
        check_host_memory(config(folder, num_kv_blocks=TOO_MANY), model)


def test_the_block_that_no_sequence_gets_counts(folder, monkeypatch):
    model = ModelConfig.from_folder(folder)
    monkeypatch.setattr(kv_cache, "block_bytes", lambda *_: GIB)
    monkeypatch.setattr(weights, "weight_bytes", lambda *_: 0)
    monkeypatch.setattr(fit, "host_memory", lambda: 10 * GIB)
    check_host_memory(config(folder, num_kv_blocks=9), model)
    with pytest.raises(ConfigError, match=r"KV cache 11\.0 GiB"):
        check_host_memory(config(folder, num_kv_blocks=10), model)


def test_all_ranks_of_this_machine_count(folder, monkeypatch):
    """A block has 16 KiB on all ranks together, and twice as much on eight: four KV heads are there twice then."""
    model = ModelConfig.from_folder(folder)
    monkeypatch.setattr(fit, "host_memory", lambda: 20 << 20)
    for tp in (1, 2, 4):
        check_host_memory(config(folder, num_kv_blocks=1000, block_size=16, tp=tp), model)
    eight = config(folder, num_kv_blocks=1000, block_size=16, tp=8)
    with pytest.raises(ConfigError, match="this machine has"):
        check_host_memory(eight, model)
    check_host_memory(config(folder, num_kv_blocks=1000, block_size=16, tp=8, interface="eth0"), model)


def test_an_allocation_that_fails_is_refused_with_what_it_asked_for(folder, monkeypatch):
    monkeypatch.setattr(fit, "host_memory", lambda: 1 << 62)
    executor = LocalExecutor(config(folder, num_kv_blocks=TOO_MANY), folder)
    with pytest.raises(ConfigError, match=r"rank 0 cannot have the memory .* asked for \d+\.\d GiB, this machine has"):
        executor.start()


OUT = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 9 GiB is free."


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (torch.OutOfMemoryError(OUT), " it asked for 20.00 GiB,"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), ""),
    ],
)
def test_a_full_gpu_is_refused_with_who_has_its_memory(folder, monkeypatch, error, asked):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (9 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 60 * GIB)
    with pytest.raises(ConfigError) as refused, refused_if_too_large(config(folder, device="cuda"), folder, 3):
        raise error
    has = "60.0 GiB are this rank's, 11.0 GiB somebody else's, 9.0 of 80.0 GiB free"
    assert str(refused.value).startswith(f"rank 3 needs more than its GPU has:{asked} {has}; lower max_model_len")


FULL = torch.OutOfMemoryError(OUT)


def gpu_refusal(folder, error, **options):
    with pytest.raises(ConfigError) as refused:  # noqa: SIM117
        with refused_if_too_large(config(folder, device="cuda", **options), folder, 3):
            raise error
    return str(refused.value)


def test_a_gpu_that_does_not_answer_any_more_is_refused_without_figures(folder, monkeypatch):
    def broken():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "mem_get_info", broken)
    found = gpu_refusal(folder, FULL)
    assert found.startswith("rank 3 needs more than its GPU has: it asked for 20.00 GiB; lower max_model_len")
    assert gpu_refusal(folder, RuntimeError("CUDA error: out of memory")).startswith(
        "rank 3 needs more than its GPU has; "
    )


@pytest.mark.parametrize(("quantization", "advised"), [("none", True), ("int8", False)])
def test_int8_is_advised_where_it_is_off(folder, monkeypatch, quantization, advised):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (9 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 60 * GIB)
    found = gpu_refusal(folder, FULL, quantization=quantization)
    assert ("int8" in found) == advised and found.endswith("more ranks")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1073741824 bytes. Error code 12"
        ),
        RuntimeError("CUDA error: out of memory"),  # pinned memory, since the GPU has some
    ],
)
def test_the_hosts_memory_is_not_blamed_on_the_gpu(folder, monkeypatch, error):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (9 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 60 * GIB)
    found = gpu_refusal(folder, error)
    assert found.startswith("rank 3 cannot have the memory that it needs beside its GPU's:")
    assert "this machine has" in found and "num_kv_blocks" not in found


def test_a_memory_error_of_python_is_refused_too_and_another_error_is_not(folder):
    with (
        pytest.raises(ConfigError, match="rank 1 cannot have the memory"),
        refused_if_too_large(config(folder), folder, 1),
    ):
        raise MemoryError
    with pytest.raises(RuntimeError, match="shapes differ"), refused_if_too_large(config(folder), folder, 1):
        raise RuntimeError("shapes differ")
