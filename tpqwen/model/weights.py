"""Weights from safetensors into a rank's parameters: only its slices are read, one tensor at a time.

Peak host memory is one slice beside the weights themselves; what is to be quantized is read some whole rows at a time.
Loading must end empty: what is missing, unexpected, wrongly shaped or cut off is named; nothing is ever half-loaded.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from tpqwen.errors import ConfigError
from tpqwen.model.checkpoint import check_folder
from tpqwen.parallel.layers import ShardedWeight
from tpqwen.parallel.shard import Part
from tpqwen.quant.schemes import quantize

QUANTIZED_ELEMENTS = 1 << 24  # at a time


def load_weights(model: nn.Module, folder: Path, *, device: torch.device, dtype: torch.dtype) -> None:
    """Give every parameter of a `meta` model its storage on the device and fill it from the checkpoint."""
    checkpoint = check_folder(folder, {part.name: part.spec.shape for _, part in _parts(model)})
    allocate(model, device, dtype)
    by_file: dict[Path, list[tuple[ShardedWeight, Part]]] = {}
    for module, part in _parts(model):
        by_file.setdefault(checkpoint.files[checkpoint.find(part.name)], []).append((module, part))
    for path, parts in by_file.items():
        try:
            with safe_open(path, framework="pt") as file:
                for module, part in parts:
                    _fill(module, part, file.get_slice(checkpoint.find(part.name)))
        except SafetensorError as error:
            raise ConfigError(f"{path}: {error}") from None


def random_weights(model: nn.Module, *, device: torch.device, dtype: torch.dtype, seed: int) -> None:
    """normal(0, 0.02) matrices and norms of one, for measuring speed without a checkpoint.

    Every rank draws each whole tensor from (seed, name) and keeps its slice, so that all TP degrees have one model.
    Peak memory: the largest full tensor beside the weights.
    """
    allocate(model, device, dtype)
    generator = torch.Generator(device)
    for module, part in _parts(model):
        if len(part.spec.shape) == 1:
            module.weight.data.fill_(1.0)
            continue
        generator.manual_seed(zlib.crc32(f"{seed} {part.name}".encode()))  # CPU generators use 32 bits of a seed
        full = torch.empty(part.spec.shape, dtype=dtype, device=device).normal_(0.0, 0.02, generator=generator)
        _fill(module, part, full)


def allocate(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Real, zeroed storage for parameters on `meta`; a parameter shared by two modules stays shared."""
    for module in _weights(model):
        module.allocate(device, dtype)


def weight_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """What the weights of one rank take once they are allocated; model may be on `meta`."""
    return sum(module.num_bytes(dtype) for module in _weights(model))


def _weights(model: nn.Module) -> Iterator[ShardedWeight]:
    return (module for module in model.modules() if isinstance(module, ShardedWeight))


def _parts(model: nn.Module) -> Iterator[tuple[ShardedWeight, Part]]:
    for module in _weights(model):
        for part in module.parts:
            yield module, part


def _fill(module: ShardedWeight, part: Part, source: object) -> None:
    """Copy this rank's slice; padding rows keep their zeros."""
    index = part.spec.index(module.group.rank, module.group.size)
    if module.scale is not None:
        _fill_quantized(module, module.scale, part, source, *index)
        return
    data: torch.Tensor = source[index]  # type: ignore[index]
    module.weight.data[part.offset : part.offset + data.shape[0]].copy_(data)


def _fill_quantized(
    module: ShardedWeight, scale: nn.Parameter, part: Part, source: object, rows: slice, columns: slice
) -> None:
    """Quantize whole rows and keep this rank's columns of them. A maximum over the ranks' columns would spare reading
    the others', but a rank that is replaced loads alone: nobody would answer."""
    step, at = max(1, QUANTIZED_ELEMENTS // part.spec.shape[1]), part.offset
    for first in range(rows.start, rows.stop, step):
        whole: torch.Tensor = source[first : min(first + step, rows.stop)]  # type: ignore[index]
        values, scales = quantize(whole.to(module.weight.device))
        place = slice(at, at + len(whole))
        module.weight.data[place].copy_(values[:, columns])
        scale.data[place].copy_(scales)
        at += len(whole)
