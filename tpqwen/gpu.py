"""NVML readings of one GPU as plain numbers; without a driver everything is empty and nothing is said.

Keys of `Gpu.readings` are the names of the tpqwen_gpu_* metrics without that prefix, plus `index`, NVML's number of the
GPU on its host (a rank itself always sees its GPU as cuda:0).
"""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Any

import pynvml

THROTTLE_REASONS = {
    "power_cap": 0x4,
    "hw_slowdown": 0x8,
    "sync_boost": 0x10,
    "sw_thermal": 0x20,
    "hw_thermal": 0x40,
    "hw_power_brake": 0x80,
}

# name -> (pynvml function, its arguments after the handle, attribute of the answer or none, scale to the unit)
_READINGS: dict[str, tuple[str, tuple[int, ...], str, float]] = {
    "index": ("nvmlDeviceGetIndex", (), "", 1.0),
    "utilization_ratio": ("nvmlDeviceGetUtilizationRates", (), "gpu", 0.01),
    "memory_used_bytes": ("nvmlDeviceGetMemoryInfo", (), "used", 1.0),
    "memory_total_bytes": ("nvmlDeviceGetMemoryInfo", (), "total", 1.0),
    "power_watts": ("nvmlDeviceGetPowerUsage", (), "", 1e-3),
    "temperature_celsius": ("nvmlDeviceGetTemperature", (pynvml.NVML_TEMPERATURE_GPU,), "", 1.0),
    "sm_clock_hertz": ("nvmlDeviceGetClockInfo", (pynvml.NVML_CLOCK_SM,), "", 1e6),
    "energy_joules_total": ("nvmlDeviceGetTotalEnergyConsumption", (), "", 1e-3),
}


class Gpu:
    """One GPU by uuid (as torch or NVML spells it); an empty uuid is the only or first one.

    A reading that the driver, the GPU or a MIG slice does not offer is left out. Costs tens of microseconds each.
    """

    def __init__(self, uuid: str = "") -> None:
        self._handle = _find(uuid)
        self.name = str(self._read("nvmlDeviceGetName") or "")
        self.uuid = str(self._read("nvmlDeviceGetUUID") or "")

    def readings(self) -> dict[str, float]:
        """What can be read now: ratios 0..1, bytes, watts, degrees Celsius, hertz, joules since the driver loaded."""
        found = {}
        for name, (call, args, attribute, scale) in _READINGS.items():
            value = self._read(call, *args)
            if value is not None:
                found[name] = float(getattr(value, attribute) if attribute else value) * scale
        return found

    def throttle_reasons(self) -> tuple[str, ...]:
        """Names from THROTTLE_REASONS that slow the GPU down now; an idle clock is not one."""
        bits = int(self._read("nvmlDeviceGetCurrentClocksEventReasons") or 0)
        return tuple(name for name, bit in THROTTLE_REASONS.items() if bits & bit)

    def _read(self, call: str, *args: Any) -> Any:
        return None if self._handle is None else _attempt(call, self._handle, *args)


def count_gpus() -> int:
    """GPUs of this host; 0 without a driver."""
    if not _initialised():
        return 0
    return int(_attempt("nvmlDeviceGetCount") or 0)


def await_exit(pids: Collection[int], uuid: str, timeout_s: float) -> bool:
    """Wait until the driver lists none of the processes on the GPU; their memory is free then. False after timeout_s.

    Where the driver lists no such process (another process namespace, a MIG slice) there is nothing to wait for.
    """
    handle, deadline = _find(uuid), time.monotonic() + timeout_s
    while handle is not None:
        listed = _attempt("nvmlDeviceGetComputeRunningProcesses", handle) or []
        if all(process.pid not in pids for process in listed):
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _initialised() -> bool:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return False
    return True


def _find(uuid: str) -> Any:
    if not _initialised():
        return None
    if not uuid:
        return _attempt("nvmlDeviceGetHandleByIndex", 0)
    return _attempt("nvmlDeviceGetHandleByUUID", uuid if "-" in uuid[:4] else f"GPU-{uuid}")


def _attempt(call: str, *args: Any) -> Any:
    """What pynvml's function `call` answers, or None where driver or GPU have no such thing."""
    try:
        return getattr(pynvml, call)(*args)
    except pynvml.NVMLError:
        return None
