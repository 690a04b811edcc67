"""Find the fastest launch parameters of matrix products on this GPU, for tpqwen/kernels/gemm_measured.csv.

    python tools/tune_products.py --models 8b --tp 1,2 --bytes 2,1 --seconds 240
    python tools/tune_products.py ... --part 0/4 --out part0.csv     # a part of the products, for one of four GPUs
    python tools/tune_products.py --merge part*.csv                  # take the parts' lines into the table

A product is timed as in a decode step: one after another in a CUDA graph, each with a weight of its own, so that none
is in L2. Tried are what the table has for the same operation and other shapes, tiles for many rows that should be fast,
and a random part of all the rest. The present choice stays where nothing is at least 2% faster. Needs a GPU, but for
--merge.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import random
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch

import tpqwen.kernels.gemm_table as tables
from tpqwen.kernels import gemm
from tpqwen.kernels.gemm_table import (
    BF16,
    COLUMNS,
    GEMV_ROWS,
    PROGRAMS,
    TABLE,
    Config,
    Numbers,
    choose,
    fit,
    shared_bytes,
)
from tpqwen.kernels.launch import SHARED_BYTES

# Hidden size, inner size, query heads, key/value heads; heads of 128.
MODELS = {
    "0.6b": (1024, 3072, 16, 8),
    "1.7b": (2048, 6144, 16, 8),
    "4b": (2560, 9728, 32, 8),
    "8b": (4096, 12288, 32, 8),
    "14b": (5120, 17408, 40, 8),
    "32b": (5120, 25600, 64, 8),
}
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 192, 256)
MANY_ROWS = (320, 576, 832, 1088, 1600, 2304)  # of passes with prompts; tried where --rows says so
GAIN = 0.98
COLD_BYTES = 4e8  # of weights that take turns: many times what L2 holds
# An H100's rates, a microsecond, in the rough estimate of what tiles take: all memory, then of one multiprocessor.
MEMORY_BYTES, L2_BYTES, MULTIPLICATIONS = 2.9e6, 6e4, 3e6
HEADER = ("operation", "weights", "width", "bytes", "rows", "path", *COLUMNS, "fuse_norm")
CSV = Path(tables.__file__).with_name("gemm_measured.csv")


class Task(NamedTuple):
    """A product of `rows` rows with a [weights, width] weight, its numbers, and how to run it."""

    operation: str
    weights: int
    width: int
    rows: int
    numbers: Numbers
    config: Config


def products(model: str, tp: int) -> Iterator[tuple[str, int, int]]:
    """The four products of a layer, of one rank: operation, rows of the weight, columns."""
    hidden, inner, heads, kv_heads = MODELS[model]
    yield "norm", (heads + 2 * max(kv_heads, tp)) * 128 // tp, hidden
    yield "add" if tp == 1 else "plain", hidden, heads * 128 // tp
    yield "silu", 2 * inner // tp, hidden
    yield "add" if tp == 1 else "plain", hidden, inner // tp


class Operands:
    """A product's tensors. copies: weights that take turns."""

    def __init__(self, task: Task, copies: int) -> None:
        generator = torch.Generator("cuda").manual_seed(1)

        def drawn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device="cuda", dtype=torch.bfloat16, generator=generator)

        def weight() -> tuple[torch.Tensor, torch.Tensor | None]:
            shape = (task.weights, task.width)
            if task.numbers.weight > 1:
                return drawn(*shape) * 0.02, None
            values = torch.randint(-127, 128, shape, device="cuda", dtype=torch.int8, generator=generator)
            return values, torch.full((task.weights,), 2e-4, device="cuda")

        self.x, self.norm = drawn(task.rows, task.width), drawn(task.width) * 0.1 + 1
        self.out = drawn(task.rows, task.weights // (2 if task.operation == "silu" else 1))
        self.weights = [weight() for _ in range(copies)]

    def run(self, operation: str, config: Config) -> None:
        """The product with each of the weights."""
        for matrix, scale in self.weights:
            if operation == "norm":
                gemm.norm_linear(self.x, self.norm, 1e-6, matrix, scale, out_TO=self.out, config=config)
            elif operation == "silu":
                gemm.norm_gate_up(self.x, self.norm, 1e-6, matrix, scale, out_TI=self.out, config=config)
            elif operation == "add":
                gemm.linear_add(self.x, matrix, self.out, scale, out_TH=self.out, config=config)
            else:
                gemm.linear(self.x, matrix, scale, out_TO=self.out, config=config)

    def microseconds(self, operation: str, config: Config) -> float:
        """Of one product: the median of five replays of a graph of all of them."""
        self.run(operation, config)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.run(operation, config)
        times = []
        for _ in range(6):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        return statistics.median(times[1:]) * 1e3 / len(self.weights)


def candidates(task: Task, count: int) -> list[Config]:
    """What is tried for a product: its present choice first."""
    size, found = task.numbers.weight, [task.config]
    known = {
        config
        for (operation, _, _, entry_size), entries in TABLE.items()
        for rows, config in entries
        if operation == task.operation and entry_size == size and rows // 2 <= task.rows <= 2 * rows
    }
    found += sorted(known)
    possible = [*_gemvs(task), *_dots(task)]
    random.Random(str(task)).shuffle(possible)
    found += [*_tiles(task)[:count], *possible[:count]]
    if task.rows >= 16:
        found.append(Config("torch"))
    fitted = (fit(config, task.rows, task.width, task.numbers) for config in found)
    return list(dict.fromkeys(c for c in fitted if c.path == "torch" or _valid(c, task)))


def _gemvs(task: Task) -> Iterator[Config]:
    if task.rows > GEMV_ROWS:
        return
    for n, k, warps, stages, prefetch in itertools.product(
        (1, 2, 4, 8), (512, 1024, 2048, 4096), (2, 4, 8), (1, 2, 4), (0, 1024)
    ):
        sums = n * k // (32 * warps)
        if task.width % k == 0 and 8 <= sums <= 64 and sums * stages * task.rows <= 192:
            yield Config("gemv", n, k, warps, stages, prefetch=prefetch)


def _dots(task: Task) -> Iterator[Config]:
    if task.rows == 1:
        return
    fused = (False, True) if task.operation in ("norm", "silu") and task.numbers.weight > 1 else (False,)
    for n, k, warps, stages, split, prefetch, fuse in itertools.product(
        (32, 64, 128), (64, 128, 256), (4, 8), (3, 4, 6), (1, 2, 4, 8), (0, 512, 1024), fused
    ):
        programs = -(-task.weights // n) * split
        if programs >= 60 and (split == 1 or programs <= 700) and not (warps == 8 and n == 32):
            yield Config("dot", n, k, warps, stages, split, prefetch, fuse_norm=fuse)


def _tiles(task: Task) -> list[Config]:
    """For more than 64 rows of 16 bits: those that should be the fastest come first."""
    if task.rows <= 64 or task.numbers.weight == 1:
        return []
    found = []
    for m, n, k, prefetch in itertools.product(
        (64, 128, 256), (32, 48, 64, 96, 128, 144, 160, 192, 256), (64, 128), (0, 256)
    ):
        warps = 4 if m * n <= 1 << 13 else 8
        stage = (m + n) * k * 2
        for stages in {min(8, room // stage) for room in (112 << 10, 226 << 10)}:
            if stages > 2 and m < 2 * task.rows and m * n <= 192 * 256:
                found.append(Config("tile", n, k, warps, stages, 1, prefetch, fuse_norm=False, block_m=m))
    return sorted(found, key=lambda config: _estimate(config, task))


def _estimate(config: Config, task: Task) -> float:
    """Microseconds, roughly: what goes on at once takes as long as the longest, and a little of the rest."""
    m, n = config.block_m, config.block_n
    turns = -(-(-(-task.rows // m) * -(-task.weights // n)) // PROGRAMS)
    parts = (
        task.weights * task.width * 2 / MEMORY_BYTES,
        turns * (m + n) * task.width * 2 / L2_BYTES,
        turns * m * n * task.width / MULTIPLICATIONS,
    )
    return max(parts) + 0.2 * sum(parts)


def _valid(config: Config, task: Task) -> bool:
    if config.path != "dot":
        return not (task.operation == "silu" and config.block_n < 2)
    batch = max(16, 1 << (task.rows - 1).bit_length())
    tiles = -(-task.weights // config.block_n)
    return (
        shared_bytes(config, task.rows, task.numbers) <= SHARED_BYTES
        and task.width // config.split >= 2 * config.block_k
        and config.block_n * batch <= config.warps * 32 * 160
        and (config.split == 1 or (tiles <= 4096 and tiles * config.split * (config.block_n + 1) * batch <= 8 << 20))
    )


def compiles(task: Task) -> str:
    """Compile into Triton's cache on disk, in a process of its own; what went wrong, or nothing."""
    try:
        Operands(task, 1).run(task.operation, task.config)
        torch.cuda.synchronize()
    except Exception as error:  # whatever it is, this candidate is out
        return f"{type(error).__name__}: {error}"[:100]
    return ""


def tune(tasks: list[Task], seconds: float, count: int, processes: int) -> list[list[object]]:
    """The lines for these products, whose configurations are the present choices. Stops when the time is over."""
    deadline = time.monotonic() + seconds
    tried = {task: candidates(task, count) for task in tasks}
    # the first candidates of all products before the second ones: a deadline leaves no product without
    rounds = itertools.zip_longest(*([task._replace(config=c) for c in configs] for task, configs in tried.items()))
    queue = [task for row in rounds for task in row if task is not None and task.config.path != "torch"]
    compiled = _compile(queue, deadline - 0.35 * seconds, processes)
    lines: list[list[object]] = []
    products_of = itertools.groupby(tasks, key=lambda t: t[:3] + t[4:5])
    for _, group in products_of:
        rows = list(group)
        size = rows[0].weights * rows[0].width * rows[0].numbers.weight
        widest = Operands(rows[-1], max(2, min(64, int(COLD_BYTES / size))))
        for task in rows:
            operands = Operands(task, 0)
            operands.weights = widest.weights
            usable = [c for c in tried[task] if c.path == "torch" or task._replace(config=c) in compiled]
            times = {c: operands.microseconds(task.operation, c) for c in usable}
            if (now := times.get(task.config)) is None:  # it was not compiled in time
                continue
            best = min(times, key=times.__getitem__)
            kept = best if times[best] < GAIN * now else task.config
            gain = f"{now:.1f} -> {times[kept]:.1f} us of {len(times)}"
            print(f"{task[:4]} {task.numbers.weight}: {gain}, {kept}", flush=True)
            lines.append(_line(task._replace(config=kept)))
        del widest
        torch.cuda.empty_cache()
        if time.monotonic() > deadline:
            print("the time is over", flush=True)
            break
    return lines


def _compile(queue: list[Task], deadline: float, processes: int) -> set[Task]:
    compiled: set[Task] = set()
    pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"))
    futures = {pool.submit(compiles, task): task for task in queue}
    failed: list[str] = []
    try:
        for future in as_completed(futures, timeout=max(1.0, deadline - time.monotonic())):
            if error := future.result():
                failed.append(error)
            else:
                compiled.add(futures[future])
    except TimeoutError:
        pass
    compilers = list((pool._processes or {}).values())  # shutdown forgets them
    pool.shutdown(wait=False, cancel_futures=True)
    for process in compilers:
        process.kill()
    print(f"{len(compiled)} of {len(queue)} candidates compiled, {len(failed)} cannot be: {failed[:2]}", flush=True)
    return compiled


def _line(task: Task) -> list[object]:
    c = task.config
    settings = [getattr(c, column) for column in COLUMNS]
    size = min(task.numbers.weight, 2)
    return [*task[:3], size, task.rows, c.path, *settings, int(c.fuse_norm)]


def write(path: Path, lines: list[list[object]]) -> None:
    """A file like the table, of these lines in order. Neighbours that say the same become one."""
    ordered = sorted(lines, key=lambda line: (str(line[0]), *(int(str(n)) for n in line[1:5])))
    kept = [a for a, b in itertools.pairwise([*ordered, []]) if not b or a[:4] != b[:4] or a[5:] != b[5:]]
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([HEADER, *kept])


def merge(lines: list[list[object]]) -> None:
    """Replace the table's choices for the products and numbers of rows of these lines."""
    new = [[str(value) for value in line] for line in lines]
    products_of, measured = {tuple(line[:4]) for line in new}, {tuple(line[:5]) for line in new}
    kept: list[list[str]] = []
    for product, group in itertools.groupby(_read(CSV), key=lambda line: tuple(line[:4])):
        entries = list(group)
        kept += _spread(entries) if product in products_of else entries
    write(CSV, [line for line in kept if tuple(line[:5]) not in measured] + new)


def _spread(entries: list[list[str]]) -> list[list[str]]:
    """A product's lines with one for each number of rows: what said the same had been said once."""
    found = []
    for rows in ROWS + MANY_ROWS:
        line = next((line for line in entries if rows <= int(line[4])), None)
        if line is not None:
            found.append([*line[:4], str(rows), *line[5:]])
    return found


def _read(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))[1:]


def _tasks(arguments: argparse.Namespace) -> list[Task]:
    known = dict.fromkeys(
        (*product, int(size))
        for size, model, tp in itertools.product(
            arguments.bytes.split(","), arguments.models.split(","), arguments.tp.split(",")
        )
        for product in products(model, int(tp))
    )
    part, parts = map(int, arguments.part.split("/"))
    tasks = []
    for operation, weights, width, size in list(known)[part::parts]:
        numbers = Numbers(2, 1) if size == 1 else BF16
        for rows in map(int, arguments.rows.split(",")):
            now = choose(operation, rows, weights, width, numbers)
            tasks.append(Task(operation, weights, width, rows, numbers, now))
    return tasks


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help=f"of {', '.join(MODELS)}")
    parser.add_argument("--tp", default="1", help="numbers of ranks")
    parser.add_argument("--bytes", default="2,1", help="of a weight: 2 for 16 bits, 1 for int8")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="of the batch")
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--candidates", type=int, default=20, help="random ones for each product and number of rows")
    parser.add_argument("--processes", type=int, default=min(16, os.cpu_count() or 1), help="that compile")
    parser.add_argument("--part", default="0/1", metavar="N/OF")
    parser.add_argument("--out", type=Path, help="write the lines here instead of into the table")
    parser.add_argument("--merge", nargs="+", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if arguments.merge:
        merge([line for path in arguments.merge for line in _read(path)])
        return
    if not torch.cuda.is_available():
        sys.exit("tuning needs a GPU")
    print(torch.cuda.get_device_name(), flush=True)
    lines = tune(_tasks(arguments), arguments.seconds, arguments.candidates, arguments.processes)
    if arguments.out:
        write(arguments.out, lines)
    else:
        merge(lines)


if __name__ == "__main__":
    main()
