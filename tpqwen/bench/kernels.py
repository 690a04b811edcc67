"""`tpqwen bench kernels`: each operation of a decode step alone, its time, bytes and share of the measured bandwidth.

B rows, H hidden. Random weights of the model's shapes; operations run one after another on different weights, more than
the device's caches hold, on a GPU as one CUDA graph. The bytes are the fewest that the operation must move.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from tpqwen.bench.environment import environment
from tpqwen.config import Config
from tpqwen.kernels import ops
from tpqwen.kernels.context import StepContext
from tpqwen.model.config import ModelConfig
from tpqwen.model.hub import resolve_model
from tpqwen.model.qwen3 import rope_table
from tpqwen.model.sizing import derive
from tpqwen.quant.schemes import SCHEMES, Scheme, quantize
from tpqwen.worker.kv_cache import KVCache
from tpqwen.worker.slots import SlotState

BEYOND_CACHE_BYTES = 256 << 20  # of one round over all copies of an operation's weights
MAX_COPIES = 64
COPY_BYTES = 1 << 30
ROUNDS = 5
EPS = 1e-6


@dataclass(frozen=True)
class Operation:
    """`run` does it once, on its i-th copy of weights or cache."""

    name: str
    num_bytes: int
    copies: int
    run: Callable[[int], object]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command beside the model's own."""
    parser.add_argument(
        "--rows", default="1,32,256", help="sequences in the step, one table for each; default 1,32,256"
    )
    parser.add_argument("--context", type=int, default=384, help="tokens in the cache of each sequence; default 384")
    parser.add_argument("--save", type=Path, help="write the results as JSON here")


def run(args: argparse.Namespace, config: Config) -> int:
    """The command: a table for each number of rows. Returns the exit code. Raises ConfigError."""
    model = ModelConfig.from_folder(resolve_model(config.model.model, config.model.revision))
    sizes = derive(config, model)
    device, dtype, invariant = torch.device(sizes.device), getattr(torch, sizes.dtype), config.model.deterministic
    shapes = Shapes(model, device, dtype, sizes.block_size, invariant, SCHEMES[config.model.quantization])
    with torch.inference_mode():
        bandwidth = copy_bandwidth(shapes.device)
        results = []
        for rows in (int(r) for r in args.rows.split(",")):
            measured = []
            for make in (shapes.matrices, shapes.attention, shapes.head):
                for operation in make(rows, args.context):
                    seconds = seconds_of(operation, shapes.device)
                    measured.append(
                        {
                            "operation": operation.name,
                            "rows": rows,
                            "us": round(seconds * 1e6, 2),
                            "bytes": operation.num_bytes,
                            "fraction": round(operation.num_bytes / seconds / bandwidth, 3),
                        }
                    )
            _print(rows, args.context, bandwidth, measured)
            results += measured
    if args.save:
        facts = {"bandwidth_bytes_s": bandwidth, "context": args.context, **environment(sizes.device)}
        args.save.write_text(json.dumps({"environment": facts, "results": results}, indent=1))
    return 0


class Shapes:
    """The operations of one decode step in a model's shapes."""

    def __init__(
        self,
        model: ModelConfig,
        device: torch.device,
        dtype: torch.dtype,
        block_size: int,
        invariant: bool,
        scheme: Scheme,
    ) -> None:
        self.device = device
        self._model = model
        self._dtype = dtype
        self._block_size = block_size
        self._invariant = invariant
        self._scheme = scheme

    def matrices(self, rows: int, _context: int) -> list[Operation]:
        """The four products of a layer with what is fused into them."""
        c, d = self._model, self._model.head_dim
        q, kv, inner, hidden = c.num_attention_heads * d, c.num_key_value_heads * d, c.intermediate_size, c.hidden_size
        h, norm, residual = self._draw(rows, hidden), self._draw(hidden), self._draw(rows, hidden)
        mixed, wide, inv = self._draw(rows, q), self._draw(rows, inner), self._invariant

        def product(
            name: str, out: int, width: int, op: Callable[[torch.Tensor, torch.Tensor | None], object]
        ) -> Operation:
            weights = self._matrices(out, width)
            num_bytes = sum(t.nbytes for t in weights[0] if t is not None)
            num_bytes += rows * (out + width) * self._dtype.itemsize
            return Operation(name, num_bytes, len(weights), lambda i: op(*weights[i]))

        def gated(weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
            return ops.norm_gate_up(h, norm, EPS, weight, scale, invariant=inv)

        return [
            product("norm + QKV", q + 2 * kv, hidden, lambda w, s: ops.norm_linear(h, norm, EPS, w, s, invariant=inv)),
            product("output + residual", hidden, q, lambda w, s: ops.linear_add(mixed, w, residual, s, invariant=inv)),
            product("norm + gate, up + SwiGLU", 2 * inner, hidden, gated),
            product("down + residual", hidden, inner, lambda w, s: ops.linear_add(wide, w, residual, s, invariant=inv)),
        ]

    def attention(self, rows: int, context: int) -> list[Operation]:
        """QK-norm, RoPE, the write of the new token and attention over `context` tokens of every row."""
        c, size = self._model, self._block_size
        per_row = -(-context // size)
        num_bytes = 2 * rows * context * c.num_key_value_heads * c.head_dim * self._dtype.itemsize
        copies = _copies_of(num_bytes)
        cache = KVCache(
            num_layers=copies,
            num_blocks=rows * per_row + 1,
            kv_heads=c.num_key_value_heads,
            block_size=size,
            head_dim=c.head_dim,
            like=self._draw(1),
        )
        cache.data.normal_()
        tables = (torch.randperm(rows * per_row) + 1).int().view(rows, per_row).to(self.device)
        last = context - 1
        every = torch.full((rows,), context, dtype=torch.int32, device=self.device)
        ctx = StepContext(
            positions_T=every - 1,
            cache_slots_T=tables[:, last // size].long() * size + last % size,
            num_decode=rows,
            tables_SM=tables,
            decode_slots_B=torch.arange(rows, dtype=torch.int32, device=self.device),
            decode_lengths_B=every,
            prefill=None,
            k_cache=cache.k,
            v_cache=cache.v,
            cos_sin=rope_table(c, context, self.device),
            settled=True,
        )
        qkv = self._draw(rows, (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim)
        norm, scale = self._draw(c.head_dim), c.head_dim**-0.5

        def attend(i: int) -> torch.Tensor:
            return ops.attend(qkv, norm, norm, EPS, i, ctx, scale, invariant=self._invariant)

        return [Operation(f"attention over {context}", num_bytes, copies, attend)]

    def head(self, rows: int, _context: int) -> list[Operation]:
        """Final norm, LM head and sampling by temperature."""
        c, inv = self._model, self._invariant
        weights = self._copies(c.vocab_size, c.hidden_size)
        h, norm = self._draw(rows, c.hidden_size), self._draw(c.hidden_size)
        state = SlotState(rows, 1, self.device).tensors
        state.temperature.fill_(0.6)
        slots = torch.arange(rows, dtype=torch.int32, device=self.device)
        return [
            Operation(
                "norm + LM head + sampling",
                weights[0].nbytes,
                len(weights),
                lambda i: ops.head_slices(h, norm, EPS, weights[i], state, slots, 0, c.vocab_size, invariant=inv),
            )
        ]

    def _draw(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=self._dtype, device=self.device)

    def _matrices(self, *shape: int) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """Weights of a layer, as the model keeps them."""
        if not self._scheme.scaled:
            return [(weight, None) for weight in self._copies(*shape)]
        return [quantize(self._draw(*shape)) for _ in range(_copies_of(math.prod(shape)))]

    def _copies(self, *shape: int) -> list[torch.Tensor]:
        return [self._draw(*shape) for _ in range(_copies_of(math.prod(shape) * self._dtype.itemsize))]


def _copies_of(num_bytes: int) -> int:
    """How many different ones of that size no cache holds together."""
    return max(2, min(MAX_COPIES, BEYOND_CACHE_BYTES // num_bytes + 1))


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of a large copy on the device."""
    size = COPY_BYTES if device.type == "cuda" else COPY_BYTES // 8
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds_of(Operation("copy", 2 * size, 1, lambda _: target.copy_(source)), device)


def seconds_of(operation: Operation, device: torch.device) -> float:
    """Seconds of one call, the best of some rounds over all copies after one to warm up."""

    def round_of_calls() -> None:
        for i in range(operation.copies):
            operation.run(i)

    round_of_calls()
    if device.type != "cuda":
        best = float("inf")
        for _ in range(ROUNDS):
            begin = time.perf_counter()
            round_of_calls()
            best = min(best, time.perf_counter() - begin)
        return best / operation.copies
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        round_of_calls()
    graph.replay()
    elapsed_ms: list[float] = []
    for _ in range(ROUNDS):
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        started.record()
        graph.replay()
        ended.record()
        torch.cuda.synchronize()
        elapsed_ms.append(started.elapsed_time(ended))
    return min(elapsed_ms) / 1e3 / operation.copies


def _print(rows: int, context: int, bandwidth: float, measured: list[dict[str, object]]) -> None:
    table = Table(title=f"{rows} rows, {context} tokens each; a copy moves {bandwidth / 1e9:.0f} GB/s")
    table.add_column("operation")
    for name in ("us", "MB", "of the bandwidth"):
        table.add_column(name, justify="right")
    for m in measured:
        table.add_row(str(m["operation"]), f"{m['us']:.2f}", f"{m['bytes'] / 1e6:.2f}", f"{m['fraction']:.0%}")  # type: ignore[operator]
    Console().print(table)
