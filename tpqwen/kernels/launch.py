"""Programmatic dependent launch (PDL) for the Triton kernels: when it is used, and what it makes safe to read early.

A kernel launched with PDL may start once every program of its predecessor has called gdc_launch_dependents or ended;
its gdc_wait returns when the predecessor has completed and its writes are visible. The rules that keep this correct:

1. Every kernel launched with PDL executes gdc_wait in at least one program, before that program's first write. Then a
   kernel's completion implies its predecessor's, and after gdc_wait everything earlier in the stream is complete.
2. Before gdc_wait only settled data may be read. A kernel starts no sooner than all programs of its predecessor have
   started; a kernel launched without PDL (cuBLAS, a copy, the first node of a CUDA graph) starts only after everything
   before it has completed. So, by induction, all that was written before the last plain launch is settled. Weights
   always are, and so is what an earlier CUDA graph or copy wrote (older K/V, block tables). What the same graph wrote
   is not, unless a plain launch follows it: a kernel that advances the lengths must be followed by a plain launch
   before any kernel reads them early, or end the graph before.
3. All writes come after gdc_wait, since the predecessor may still read what is overwritten.
4. Where two branches of a graph join (kernels/branch.py) a kernel has two predecessors. gdc_wait waits for both (shown
   by tests/device/test_branch.py, said nowhere that we know of). A plain launch settles what its own branch and what
   came before the fork have written, not the other branch.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import functools
from types import ModuleType

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

PDL_CAPABILITY = (9, 0)


SHARED_BYTES = 227 * 1024  # that one program may take on H100 and H200


def fitting_stages(stages: int, stage_bytes: int, other_bytes: int = 0) -> int:
    """Pipeline stages of so many bytes that shared memory holds beside the rest: plans are measured in 16 bits, and
    float32 takes twice as much."""
    return max(1, min(stages, (SHARED_BYTES - other_bytes) // stage_bytes))


@functools.cache
def _pdl_supported(index: int) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(index) >= PDL_CAPABILITY


def pdl_supported(device: torch.device) -> bool:
    """Whether kernels on this device may use PDL: CUDA, capability 9.0 or more. Never in the interpreter."""
    if device.type != "cuda":
        return False
    return _pdl_supported(torch.cuda.current_device() if device.index is None else device.index)


def stamps_time(device: torch.device) -> bool:
    """Whether kernels on this device can read its clock. Never in the interpreter."""
    return device.type == "cuda" and torch.version.hip is None


def launch_options(device: torch.device) -> dict[str, bool]:
    """Keyword arguments of a kernel launch: the constexpr PDL, and launch_pdl where the device supports it."""
    return {"PDL": True, "launch_pdl": True} if pdl_supported(device) else {"PDL": False}


def settle_keys(*modules: ModuleType) -> None:
    """Give all kernels of these modules, lower ones first, their keys in Triton's cache.

    Triton 3.6 and 3.7 leave the constants of a called function out of its caller's key if it had no key of its own yet.
    So what was compiled once would be compiled again by a process that comes by its kernels in another order.
    """
    for module in modules:
        for value in vars(module).values():
            if isinstance(value, triton.JITFunction):
                hash(value)  # of its key, which is made and kept


@triton.jit
def release_next(PDL: tl.constexpr):
    """The next kernel may start as soon as all programs of this one have called this. Nothing without PDL."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait_previous(PDL: tl.constexpr):
    """Wait until all earlier kernels are complete and their writes visible. Nothing without PDL."""
    if PDL:
        gdc_wait()


@triton.jit
def prefetch_l2(pointers, bytes):
    """Ask for so many bytes from each of `pointers`, multiples of 16; loads nothing. Not available in the interpreter.

    A warp issues one request after another, so its threads had better name one piece: they ask for it once.
    """
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.gt.s32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r",
        [pointers.to(tl.int64), bytes],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def prefetch_weights(w, rows, K, start, BLOCK_N: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr):
    """Ask for columns start .. start + COLUMNS of the weight's `rows` [BLOCK_N, 1] to be brought into L2."""
    # One piece of one row per thread, so that the pieces cover the tile exactly once.
    PIECES: tl.constexpr = WARPS * 32 // BLOCK_N
    pieces = w + rows * K + (start + tl.arange(0, PIECES)[None, :] * (COLUMNS // PIECES))
    size = COLUMNS // PIECES * (w.dtype.element_ty.primitive_bitwidth // 8)
    prefetch_l2(pieces, tl.full([BLOCK_N, PIECES], size, tl.int32))
