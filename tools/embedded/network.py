"""Qwen3's forward pass in plain torch for training, with transformers' parameter names.

Letters: B sequences, T tokens, H hidden, N heads, D head size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps).to(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention with per-head q/k norm before RoPE."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, self.head_dim = config["hidden_size"], config["head_dim"]
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.q_proj = nn.Linear(hidden, heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(hidden, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * self.head_dim, hidden, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config["rms_norm_eps"])
        self.k_norm = RMSNorm(self.head_dim, config["rms_norm_eps"])
        self.group = heads // kv_heads

    def forward(self, x_BTH: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
        B, T, _ = x_BTH.shape
        q_BNTD = self.q_norm(self.q_proj(x_BTH).view(B, T, -1, self.head_dim)).transpose(1, 2)
        k_BNTD = self.k_norm(self.k_proj(x_BTH).view(B, T, -1, self.head_dim)).transpose(1, 2)
        v_BNTD = self.v_proj(x_BTH).view(B, T, -1, self.head_dim).transpose(1, 2)
        q_BNTD, k_BNTD = rotate(q_BNTD, cos_TD, sin_TD), rotate(k_BNTD, cos_TD, sin_TD)
        k_BNTD, v_BNTD = (t.repeat_interleave(self.group, dim=1) for t in (k_BNTD, v_BNTD))
        out_BNTD = F.scaled_dot_product_attention(q_BNTD, k_BNTD, v_BNTD, is_causal=True)
        return self.o_proj(out_BNTD.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, inter = config["hidden_size"], config["intermediate_size"]
        self.gate_proj = nn.Linear(hidden, inter, bias=False)
        self.up_proj = nn.Linear(hidden, inter, bias=False)
        self.down_proj = nn.Linear(inter, hidden, bias=False)

    def forward(self, x_BTH: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BTH)) * self.up_proj(x_BTH))


class Layer(nn.Module):
    """Pre-norm attention and MLP, each added to the stream."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config["hidden_size"], config["rms_norm_eps"])
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config["hidden_size"], config["rms_norm_eps"])
        self.mlp = MLP(config)

    def forward(self, x_BTH: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
        x_BTH = x_BTH + self.self_attn(self.input_layernorm(x_BTH), cos_TD, sin_TD)
        return x_BTH + self.mlp(self.post_attention_layernorm(x_BTH))


class Decoder(nn.Module):
    """Embedding, layers, final norm."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.layers = nn.ModuleList(Layer(config) for _ in range(config["num_hidden_layers"]))
        self.norm = RMSNorm(config["hidden_size"], config["rms_norm_eps"])


class Qwen3(nn.Module):
    """The whole model; its head is the embedding (tied)."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.apply(initialise)
        depth_scale = (2 * config["num_hidden_layers"]) ** -0.5
        for layer in self.model.layers:
            for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
                nn.init.normal_(projection.weight, std=0.02 * depth_scale)
        inv_freq_D = config["rope_theta"] ** -(torch.arange(0, config["head_dim"], 2).float() / config["head_dim"])
        angles_TD = torch.outer(torch.arange(config["max_position_embeddings"]).float(), inv_freq_D).repeat(1, 2)
        self.register_buffer("cos_TD", angles_TD.cos(), persistent=False)
        self.register_buffer("sin_TD", angles_TD.sin(), persistent=False)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Hidden states [B, T, H] after the final norm."""
        x_BTH = self.model.embed_tokens(ids_BT)
        cos_TD, sin_TD = self.cos_TD[: ids_BT.shape[1]], self.sin_TD[: ids_BT.shape[1]]
        for layer in self.model.layers:
            x_BTH = layer(x_BTH, cos_TD, sin_TD)
        return self.model.norm(x_BTH)

    def loss(self, ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Sum of the cross entropy in nats over targets that are not -100."""
        logits_BTV = F.linear(self(ids_BT), self.model.embed_tokens.weight)
        return F.cross_entropy(
            logits_BTV.float().flatten(0, 1), targets_BT.flatten(), ignore_index=-100, reduction="sum"
        )


def initialise(module: nn.Module) -> None:
    """Normal with deviation 0.02 for every matrix."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)


def rotate(x_BNTD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """RoPE, first half of D with the second half."""
    low, high = x_BNTD.chunk(2, dim=-1)
    cos_TD, sin_TD = cos_TD.to(x_BNTD.dtype), sin_TD.to(x_BNTD.dtype)
    return x_BNTD * cos_TD + torch.cat((-high, low), dim=-1) * sin_TD


def save_weights(model: Qwen3, folder: Path) -> None:
    """model.safetensors in bf16 with transformers' names; the tied head is not stored twice."""
    tensors = {name: p.detach().to("cpu", torch.bfloat16).contiguous() for name, p in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def load_weights(model: Qwen3, folder: Path) -> None:
    """The reverse of save_weights, in place; strict."""
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
