"""What a figure was measured on: stands in every saved result."""

from __future__ import annotations

import platform
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
