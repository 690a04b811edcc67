"""What a folder's safetensors files hold, from their headers alone. No torch here: the server's command looks too."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path

from tpqwen.errors import ConfigError
from tpqwen.model.config import ModelConfig

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
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


def tensor_shapes(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a Qwen3 checkpoint has, by the names of transformers' modeling_qwen3.py."""
    hidden, inner, d = c.hidden_size, c.intermediate_size, c.head_dim
    q, kv, vocab = c.num_attention_heads * d, c.num_key_value_heads * d, (c.vocab_size, hidden)
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.q_norm": (d,),
        "self_attn.k_norm": (d,),
        "self_attn.o_proj": (hidden, q),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    layers = {f"model.layers.{n}.{name}.weight": s for n in range(c.num_hidden_layers) for name, s in layer.items()}
    ends = {"model.embed_tokens.weight": vocab, "model.norm.weight": (hidden,)}
    return ends | layers | ({} if c.tie_word_embeddings else {"lm_head.weight": vocab})


def check_folder(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> Checkpoint:
    """Every check that needs only headers: these tensors, in these shapes, and no others. Raises ConfigError."""
    checkpoint = Checkpoint(folder)
    used = set()
    for name, shape in shapes.items():
        stored = checkpoint.find(name)
        used.add(stored)
        if checkpoint.shapes[stored] != shape:
            found, wanted = list(checkpoint.shapes[stored]), list(shape)
            raise ConfigError(f"{checkpoint.files[stored].name}: tensor {stored} has shape {found}, not {wanted}")
    tied_head = {"lm_head.weight"} - set(shapes)
    left = sorted(n for n in set(checkpoint.files) - used - tied_head if not n.endswith(IGNORED_SUFFIXES))
    if left:
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        raise ConfigError(f"{folder}: tensors that Qwen3 does not have: {', '.join(left[:3])}{more}")
    return checkpoint


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
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
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
