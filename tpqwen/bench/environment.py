"""What a figure was measured on: stands in every saved result. And peak memory, on whichever device."""

from __future__ import annotations

import contextlib
import platform
import resource
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def environment(device: str) -> dict[str, str]:
    """GPU or CPU, driver, versions and commit of this run. device: auto, cpu or cuda, as it was asked for."""
    facts = {"python": platform.python_version(), "torch": torch.__version__, "commit": _commit()}
    for package in ("triton", "transformers", "ray"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            continue
    if _on_gpu(device):
        facts["gpu"] = torch.cuda.get_device_name()
        facts["cuda"] = torch.version.cuda or ""
        facts["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    else:
        facts["cpu"] = f"{platform.machine()}, {torch.get_num_threads()} threads"
    return facts


def reset_peak_memory(device: str) -> None:
    """Begin a new measurement of peak_memory_mib. Off Linux a CPU process's peak cannot be reset."""
    if _on_gpu(device):
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # 5: forget the peak resident size, see proc(5)


def peak_memory_mib(device: str) -> float:
    """Memory of this process's tensors on a GPU at its peak, or on a CPU its resident memory at its peak. MiB."""
    if _on_gpu(device):
        return torch.cuda.max_memory_allocated() / 2**20
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _on_gpu(device: str) -> bool:
    return device != "cpu" and torch.cuda.is_available()


def _commit() -> str:
    return _output("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty")


def _output(*command: str) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except OSError:
        return ""
    return result.stdout.strip()
