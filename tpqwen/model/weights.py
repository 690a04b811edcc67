"""Weights from safetensors into a rank's parameters: only its slices are read, one tensor at a time.

Peak host memory is one slice beside the weights themselves; what is to be quantized is read some whole rows at a time.
Loading must end empty: what is missing, unexpected, wrongly shaped or cut off is named; nothing is ever half-loaded.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from tpqwen.errors import ConfigError
from tpqwen.parallel.layers import ShardedWeight
from tpqwen.parallel.shard import Part
from tpqwen.quant.schemes import quantize

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
QUANTIZED_ELEMENTS = 1 << 24  # at a time
MAX_HEADER_BYTES = 100 * 1024 * 1024
DTYPE_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "F64": 8}  # what a Qwen3 weight may be stored as
IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)


class Checkpoint:
    """The tensors of a folder by name, from headers alone. Raises ConfigError for a damaged or unsafe file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in self._paths():
            for name, shape in _header(path).items():
                if name in self.files:
                    raise ConfigError(f"tensor {name} is in both {self.files[name].name} and {path.name}")
                self.files[name], self.shapes[name] = path, shape
        self._check_index()

    def find(self, name: str) -> str:
        """The stored name of a tensor; checkpoints without the `model.` prefix are accepted. Raises ConfigError."""
        for candidate in (name, name.removeprefix("model.")):
            if candidate in self.files:
                return candidate
        raise ConfigError(f"{self.folder}: tensor {name} is missing")

    def _paths(self) -> list[Path]:
        names = sorted(set(self._index().values())) if (self.folder / INDEX).exists() else [SINGLE]
        return [_inside(self.folder, n) for n in names]

    def _index(self) -> dict[str, str]:
        try:
            weight_map = json.loads((self.folder / INDEX).read_text())["weight_map"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{self.folder / INDEX} is damaged: {error}") from None
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise ConfigError(f"{self.folder / INDEX}: weight_map does not map names to files")
        return weight_map

    def _check_index(self) -> None:
        if not (self.folder / INDEX).exists():
            return
        for name, file in self._index().items():
            if name not in self.files or self.files[name].name != file:
                raise ConfigError(f"{INDEX} says that tensor {name} is in {file}, but it is not")


def check_folder(folder: Path, model: nn.Module) -> Checkpoint:
    """Every check that needs only headers, before any process starts. model may be on `meta`. Raises ConfigError."""
    checkpoint = Checkpoint(folder)
    used = set()
    for _, part in _parts(model):
        stored = checkpoint.find(part.name)
        used.add(stored)
        if checkpoint.shapes[stored] != part.spec.shape:
            found, wanted = list(checkpoint.shapes[stored]), list(part.spec.shape)
            raise ConfigError(f"{checkpoint.files[stored].name}: tensor {stored} has shape {found}, not {wanted}")
    tied_head = {"lm_head.weight"} if not any(p.name == "lm_head.weight" for _, p in _parts(model)) else set()
    left = sorted(n for n in set(checkpoint.files) - used - tied_head if not n.endswith(IGNORED_SUFFIXES))
    if left:
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        raise ConfigError(f"{folder}: tensors that Qwen3 does not have: {', '.join(left[:3])}{more}")
    return checkpoint


def load_weights(model: nn.Module, folder: Path, *, device: torch.device, dtype: torch.dtype) -> None:
    """Give every parameter of a `meta` model its storage on the device and fill it from the checkpoint."""
    checkpoint = check_folder(folder, model)
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


def _inside(folder: Path, name: str) -> Path:
    """The file's path. Links are followed only within the model's own repository folder: a Hub cache links blobs."""
    path = folder / name
    root = folder.resolve()
    if root.parent.name == "snapshots":
        root = root.parent.parent
    if Path(name).name != name or not path.resolve().is_relative_to(root):
        raise ConfigError(f"{folder}: {name} points outside the model's folder")
    if not path.is_file():
        raise ConfigError(f"{folder}: {name} is missing; only safetensors checkpoints are read")
    return path


def _header(path: Path) -> dict[str, tuple[int, ...]]:
    """Tensor shapes from a safetensors header; the file's size must be exactly what the header describes.

    The types are checked too: whatever is no plain float (a quantized tensor) is refused by its name. An entry that
    lies about its own size is damage, found here because safetensors itself sees it only after parameters exist.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else MAX_HEADER_BYTES + 1
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise ConfigError(f"{path}: not a safetensors file, or cut off in its header")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            ends = {n: int(t["data_offsets"][1]) for n, t in header.items()}
            sizes = {n: ends[n] - int(t["data_offsets"][0]) for n, t in header.items()}
            shapes = {n: tuple(int(d) for d in t["shape"]) for n, t in header.items()}
            dtypes = {n: str(t["dtype"]) for n, t in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ConfigError(f"{path}: damaged safetensors header ({type(error).__name__})") from None
    for name, dtype in dtypes.items():
        if dtype not in DTYPE_BYTES:
            raise ConfigError(f"{path}: tensor {name} is stored as {dtype}, not as {', '.join(DTYPE_BYTES)}")
        if sizes[name] != DTYPE_BYTES[dtype] * math.prod(shapes[name]):
            raise ConfigError(f"{path}: tensor {name} has {sizes[name]} bytes, which is not its shape {shapes[name]}")
    end = max(ends.values(), default=0)
    if size != 8 + length + end:
        raise ConfigError(f"{path}: {size} bytes, but its header describes {8 + length + end}; the file is cut off")
    return shapes
