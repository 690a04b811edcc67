"""Tiny random Qwen3 checkpoints in Hugging Face format."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from tpqwen.quant.schemes import quantize

DEFAULTS: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def tiny_checkpoint(folder: Path, seed: int = 0, max_shard_size: str = "5GB", **overrides: Any) -> Path:
    """Save random fp32 weights (large enough that greedy choices are clear) and generation_config.json."""
    values = DEFAULTS | overrides
    torch.manual_seed(seed)
    theta = values.pop("rope_theta")
    config = Qwen3Config(**values, rope_parameters={"rope_type": "default", "rope_theta": theta}, dtype="float32")
    model = Qwen3ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [values["eos_token_id"], 2], "temperature": 0.6, "top_k": 20, "top_p": 0.95})
    )
    return folder


def dequantized(folder: Path, target: Path) -> Path:
    """The checkpoint as int8 makes it, in float32: projections are quantized and multiplied out again."""
    shutil.copytree(folder, target)
    tensors = load_file(folder / "model.safetensors")
    for name, weight in tensors.items():
        tensors[name] = weight.float()
        if "_proj" in name:
            values, scale = quantize(weight)
            tensors[name] = values * scale[:, None]
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target
