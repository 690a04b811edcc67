"""Kernels side by side within a CUDA graph: one chain on the current stream, another one on a stream of its own.

A device that is short of memory bandwidth has tensor cores to spare, and the other way round. Outside a capture
everything stays in turn: launching for two streams would cost the host more than it saves.

The branch's first kernel begins when all before the fork is complete; the one that follows on the current stream may be
there earlier, by PDL, and takes the room it wants first.
"""

from __future__ import annotations

import functools

import torch


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def fork(device: torch.device) -> torch.cuda.Stream | None:
    """The stream of a branch that begins here, for `torch.cuda.stream`; None (which changes nothing) where no graph is
    captured. What it uses must have been made before, and lives until `join`."""
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        return None
    stream = _stream(device)
    stream.wait_stream(torch.cuda.current_stream())
    return stream


def join(stream: torch.cuda.Stream | None) -> None:
    """From here on the branch is complete."""
    if stream is not None:
        torch.cuda.current_stream().wait_stream(stream)
