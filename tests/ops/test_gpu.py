"""NVML readings: complete with a GPU, partial where it lacks some, silent without a driver."""

from __future__ import annotations

from types import SimpleNamespace

import pynvml
import pytest

from tpqwen.gpu import Gpu, await_exit, count_gpus


def refuse(*args):
    raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)


@pytest.fixture
def driver(monkeypatch):
    """A host with one GPU that has no energy counter."""
    answers = {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetCount": lambda: 1,
        "nvmlDeviceGetHandleByIndex": lambda index: f"handle {index}",
        "nvmlDeviceGetHandleByUUID": lambda uuid: f"handle of {uuid}",
        "nvmlDeviceGetName": lambda handle: "GPU of " + handle,
        "nvmlDeviceGetUUID": lambda handle: "GPU-abc",
        "nvmlDeviceGetIndex": lambda handle: 3,
        "nvmlDeviceGetUtilizationRates": lambda handle: SimpleNamespace(gpu=50),
        "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(used=10, total=100),
        "nvmlDeviceGetPowerUsage": lambda handle: 250_000,
        "nvmlDeviceGetTemperature": lambda handle, sensor: 60,
        "nvmlDeviceGetClockInfo": lambda handle, clock: 1980,
        "nvmlDeviceGetTotalEnergyConsumption": refuse,
        "nvmlDeviceGetCurrentClocksEventReasons": lambda handle: 0x1 | 0x4 | 0x40,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, answer)


@pytest.mark.usefixtures("driver")
def test_readings_are_in_base_units_and_lack_what_the_gpu_lacks():
    assert Gpu().readings() == {
        "index": 3,
        "utilization_ratio": 0.5,
        "memory_used_bytes": 10,
        "memory_total_bytes": 100,
        "power_watts": 250,
        "temperature_celsius": 60,
        "sm_clock_hertz": 1.98e9,
    }
    assert count_gpus() == 1


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize("uuid", ["abc", "GPU-abc"])
def test_a_uuid_is_taken_as_torch_and_as_nvml_spell_it(uuid):
    gpu = Gpu(uuid)
    assert gpu.name == "GPU of handle of GPU-abc"
    assert gpu.uuid == "GPU-abc"


@pytest.mark.usefixtures("driver")
def test_an_idle_clock_is_no_throttle_reason():
    assert Gpu().throttle_reasons() == ("power_cap", "hw_thermal")


@pytest.mark.usefixtures("driver")
def test_an_unknown_uuid_reads_nothing(monkeypatch):
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", refuse)
    assert Gpu("gone").readings() == {}


def test_without_a_driver_there_is_silence(monkeypatch, capfd):
    monkeypatch.setattr(pynvml, "nvmlInit", refuse)
    gpu = Gpu()
    assert (gpu.readings(), gpu.throttle_reasons(), gpu.name, gpu.uuid, count_gpus()) == ({}, (), "", "", 0)
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("driver")
def test_a_successor_waits_until_the_driver_no_longer_lists_its_predecessor(monkeypatch):
    lists = [[7, 8, 5], [5], [7], [8], []]
    name = "nvmlDeviceGetComputeRunningProcesses"
    monkeypatch.setattr(pynvml, name, lambda handle: [SimpleNamespace(pid=pid) for pid in lists.pop(0)], raising=False)
    assert await_exit([5, 7], "abc", 5.0)
    assert lists == [[]]
    monkeypatch.setattr(pynvml, name, lambda handle: [SimpleNamespace(pid=7)], raising=False)
    assert not await_exit([7], "abc", 0.1)
    assert await_exit({9}, "abc", 0.1)
    monkeypatch.setattr(pynvml, name, refuse, raising=False)
    assert await_exit([7], "abc", 0.1)
