"""What a rank's memory came to at most."""

from __future__ import annotations

import contextlib
import resource
from pathlib import Path

import torch


def take_peak(device: torch.device) -> int:
    """Bytes since this was last asked: of this process's tensors on a GPU, or on a CPU of the process itself. Off Linux
    a CPU process's peak cannot be reset: since it began."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                peak = int(line.split()[1]) * 1024
        Path("/proc/self/clear_refs").write_text("5")  # 5: forget the peak resident size, see proc(5)
    return peak
