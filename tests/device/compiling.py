"""Programs for test_build.py, each a process of its own: kernels compiled for an H100 where there is none.

    python -m tests.device.compiling build | later | rest | nothing | launch | dead | record | keys | worker WIDTH

Tensors are the CPU's. The driver that Triton is given here takes compiled kernels, says that they are loaded, and runs
nothing.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget

from tpqwen.kernels import (
    build_worker,
    cuda,
    exchange,
    gemm,
    gemm_norm,
    gemm_tiles,
    launch,
    norm,
    recording,
    sampling,
    stepping,
)
from tpqwen.kernels.gemm_table import Config
from tpqwen.kernels.variant import Kernel, parse
from tpqwen.parallel.peers import blank
from tpqwen.worker.builder import Builder, Launch

MODULES = (launch, norm, gemm_norm, gemm_tiles, gemm, sampling, stepping)
TILE = Config("tile", 96, 64, warps=4, stages=4, prefetch=256, fuse_norm=False, block_m=64)


class NoDevice:
    """As much of a Triton driver as a launch asks for."""

    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 232448},
        load_binary=lambda *args: ("module", "function", 0, 0, 1024),
    )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *args: None


@triton.jit
def filled(x, VALUE: triton.language.constexpr):  # type: ignore[no-untyped-def]
    triton.language.store(x, VALUE)


def launches() -> list[Launch]:
    """Products with one row, with many and in tiles, a norm, edits between passes, and a sum over ranks, which takes
    a type as a constant: seven kernels."""
    x_TI, weight_OI = torch.zeros(64, 256, dtype=torch.bfloat16), torch.zeros(512, 256, dtype=torch.bfloat16)
    tables, ints = torch.zeros(9, 4, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    return [
        lambda: gemm.linear(x_TI[:1], weight_OI),
        lambda: gemm.linear(x_TI, weight_OI),
        lambda: gemm.linear(x_TI, weight_OI, config=TILE),
        lambda: norm.rms_norm(x_TI, weight_OI[0], 1e-6),
        lambda: stepping.edit_slots(tables, ints[None]),
        lambda: stepping.set_rows(torch.zeros(8, dtype=torch.int32), ints, 8),
        lambda: exchange.compile_for(blank(0, 2, 1 << 16, x_TI.device), x_TI),
    ]


def builds() -> None:
    """As a rank does it; a launch that fails is one that will be told when it is made."""
    builder = Builder(1)
    builder.build([lambda: 1 / 0, *launches()])
    builder.close()


def builds_later() -> None:
    """The first two at once. Prints how many of the others are gone through, when they have been waited for."""
    gone_through: list[int] = []

    def watched(number: int, make: Launch) -> Launch:
        return lambda: (gone_through.append(number), make())

    builder = Builder(1)
    builder.build(launches()[:2], (), [watched(*each) for each in enumerate(launches()[2:])])
    builder.built(1, 60.0)
    for number in range(len(gone_through) + 2):
        assert builder.built(number, 60.0), "what is not queued is there when the others are"
    assert builder._process is None and gone_through == list(range(len(gone_through)))
    print(len(gone_through))


def builds_the_rest() -> None:
    """The first two are in the cache, and the others are not: nobody waits for them now, but they will be there."""
    interrupted = Builder(1)
    interrupted.build(launches()[:2])
    interrupted.close()
    builder = Builder(1)
    builder.build(launches()[:2], launches()[2:3], launches()[3:])
    assert builder._process is not None, "not waited for"
    for number in range(len(launches())):
        assert builder.built(number, 60.0)
    assert builder._process is None


def nothing_to_build() -> None:
    """All is in the cache: of many later ones few are looked at, and nobody waits for them."""
    looked_at: list[int] = []
    builder = Builder(1)
    builder.build(
        launches()[:4], launches()[4:], [lambda number=number: looked_at.append(number) for number in range(40)]
    )
    print(builder._process, builder.built(1), *looked_at)


def launches_all() -> None:
    """One after another, by Triton alone: `True` for each kernel that it found in its cache."""

    def listener(*, cache_hit: bool, **_: Any) -> None:
        print(cache_hit)

    knobs.compilation.listener = listener
    for make in launches():
        make()


def dies() -> None:
    """The process that should compile ends at once, with or without having taken what it was sent."""
    sys.executable = "/bin/true"
    builds()
    launches_all()


def records() -> None:
    """What is noted is not launched, and only what this thread launches is noted."""
    made: list[str] = []

    def before(**call: Any) -> bool:
        made.append(call["fn"].name)
        return True

    knobs.runtime.jit_cache_hook = before
    kernels: list[Kernel] = []
    with recording.recorded(kernels.append):
        for make in [*launches(), *launches()]:
            make()
        filled[(1,)](torch.zeros(1), float("inf"))  # a constant that is no literal
        other = threading.Thread(target=launches()[3])
        other.start()
        other.join()
        assert torch.empty(1000).eq(0).all() and torch.zeros(1).new_empty(1000).eq(0).all()
    assert knobs.runtime.jit_cache_hook is before
    print([k.name for k in kernels], made)
    assert [parse(repr(tuple(k))) for k in kernels] == kernels


def keys() -> None:
    """Kernels whose key is another one than a process would give them that hashed all that they call before."""
    found = [(k, triton.jit(k.fn).cache_key) for m in MODULES for k in vars(m).values() if hasattr(k, "cache_key")]
    print(len(found) > 20, [k.__name__ for k, fresh in found if k.cache_key != fresh])
    assert cuda.OPERATIONS


def works() -> int:
    """The worker with kernels that fail, whose compiler prints, or that take a minute; and a fork that fails once."""

    def compile_kernel(kernel: Kernel) -> None:
        os.write(2, f"{os.getpid()} {os.nice(0)}\n".encode())  # in one piece: children share the pipe
        if kernel.name == "fails":
            raise ValueError(kernel.name)
        if kernel.name == "prints":
            os.write(1, b"all of the assembly\n" * 500)
        time.sleep(60 * (kernel.name == "slow"))

    forks, real = iter(range(1000)), os.fork

    def fork() -> int:
        if os.environ.get("FAILS") == str(next(forks)):
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return real()

    build_worker.os.fork = fork
    build_worker.compile_kernel = compile_kernel
    return build_worker.main(sys.argv[2:])


if __name__ == "__main__":
    triton.runtime.driver.set_active(NoDevice())
    programs = {
        "build": builds,
        "later": builds_later,
        "rest": builds_the_rest,
        "nothing": nothing_to_build,
        "launch": launches_all,
    }
    programs |= {"dead": dies, "record": records, "keys": keys, "worker": works}
    sys.exit(programs[sys.argv[1]]())
