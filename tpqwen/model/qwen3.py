"""Qwen3, as transformers' modeling_qwen3.py has it, over tensor-parallel layers.

T tokens, H hidden, N query heads, D head size, V vocabulary (local). h is the residual stream. With it, scaled is what
the product that made it has done for the norm of the next one, if anything.
"""

from __future__ import annotations

import torch
from torch import nn

from tpqwen.kernels import ops
from tpqwen.kernels.context import NormedProduct, Scaled, SlotTensors, StepContext
from tpqwen.model.config import ModelConfig
from tpqwen.parallel.group import TPGroup
from tpqwen.parallel.layers import ColumnParallel, ReplicatedWeight, RowParallel, VocabParallel
from tpqwen.quant.schemes import NONE, Scheme


class Attention(nn.Module):
    """Per-head RMSNorm on q and k before RoPE; each group of query heads shares a key/value head."""

    def __init__(self, c: ModelConfig, group: TPGroup, layer: int, invariant: bool, scheme: Scheme) -> None:
        super().__init__()
        at, q, kv, d = f"model.layers.{layer}.", c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.layer, self.eps, self.scale, self.invariant = layer, c.rms_norm_eps, d**-0.5, invariant
        self.norm = ReplicatedWeight(group, at + "input_layernorm.weight", c.hidden_size)
        projections = {
            at + "self_attn.q_proj.weight": (q * d, q),
            at + "self_attn.k_proj.weight": (kv * d, kv),
            at + "self_attn.v_proj.weight": (kv * d, kv),
        }
        self.qkv = ColumnParallel(group, c.hidden_size, projections, scheme)
        self.q_norm = ReplicatedWeight(group, at + "self_attn.q_norm.weight", d)
        self.k_norm = ReplicatedWeight(group, at + "self_attn.k_norm.weight", d)
        o = (at + "self_attn.o_proj.weight", (c.hidden_size, q * d), q)
        self.o = RowParallel(group, *o, invariant=invariant, scheme=scheme)

    @property
    def first(self) -> NormedProduct:
        """The product it begins with."""
        return NormedProduct("norm", self.norm.weight, self.qkv.weight)

    def forward(
        self,
        h_TH: torch.Tensor,
        ctx: StepContext,
        scaled: Scaled | None = None,
        following: NormedProduct | None = None,
    ) -> tuple[torch.Tensor, Scaled | None]:
        norm = (self.norm.weight, self.eps)
        qkv = ops.norm_linear(h_TH, *norm, *self.qkv.matrix, scaled=scaled, invariant=self.invariant)
        norms, where = (self.q_norm.weight, self.k_norm.weight, self.eps), (self.layer, ctx, self.scale)
        mixed = ops.attend(qkv, *norms, *where, invariant=self.invariant)
        out: tuple[torch.Tensor, Scaled | None] = self.o(mixed, h_TH, following)
        return out


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, c: ModelConfig, group: TPGroup, layer: int, invariant: bool, scheme: Scheme) -> None:
        super().__init__()
        at, inner = f"model.layers.{layer}.", c.intermediate_size
        self.eps, self.invariant = c.rms_norm_eps, invariant
        self.norm = ReplicatedWeight(group, at + "post_attention_layernorm.weight", c.hidden_size)
        projections = {at + "mlp.gate_proj.weight": (inner, inner), at + "mlp.up_proj.weight": (inner, inner)}
        self.gate_up = ColumnParallel(group, c.hidden_size, projections, scheme)
        down = (at + "mlp.down_proj.weight", (c.hidden_size, inner), inner)
        self.down = RowParallel(group, *down, invariant=invariant, scheme=scheme)

    @property
    def first(self) -> NormedProduct:
        """The product it begins with."""
        return NormedProduct("silu", self.norm.weight, self.gate_up.weight)

    def forward(
        self, h_TH: torch.Tensor, scaled: Scaled | None = None, following: NormedProduct | None = None
    ) -> tuple[torch.Tensor, Scaled | None]:
        norm = (self.norm.weight, self.eps)
        inner = ops.norm_gate_up(h_TH, *norm, *self.gate_up.matrix, scaled=scaled, invariant=self.invariant)
        out: tuple[torch.Tensor, Scaled | None] = self.down(inner, h_TH, following)
        return out


class Qwen3(nn.Module):
    """The whole model. Build it under `torch.device("meta")`; weights.py gives the parameters their storage.

    num_ids: token ids that exist; logits of the embedding's padding rows above it are -inf. None: all rows are real.
    invariant: a token's hidden state and logits are, bit by bit, a function of its sequence up to it.
    scheme: how the projections' weights are kept. heads: query heads and key/value heads of this rank, and their size.
    """

    def __init__(
        self,
        c: ModelConfig,
        group: TPGroup,
        num_ids: int | None = None,
        *,
        invariant: bool = False,
        scheme: Scheme = NONE,
    ) -> None:
        super().__init__()
        vocab = (c.vocab_size, c.hidden_size, c.vocab_size if num_ids is None else num_ids)
        self.eps, self.invariant, self.scheme = c.rms_norm_eps, invariant, scheme
        self.heads = (c.num_attention_heads // group.size, c.local_kv_heads(group.size), c.head_dim)
        self.embed = VocabParallel(group, "model.embed_tokens.weight", *vocab, invariant=invariant)
        layers = range(c.num_hidden_layers)
        self.attention = nn.ModuleList(Attention(c, group, i, invariant, scheme) for i in layers)
        self.mlp = nn.ModuleList(MLP(c, group, i, invariant, scheme) for i in layers)
        self.norm = ReplicatedWeight(group, "model.norm.weight", c.hidden_size)
        self.lm_head = self.embed
        if not c.tie_word_embeddings:
            self.lm_head = VocabParallel(group, "lm_head.weight", *vocab, invariant=invariant)

    def forward(self, ids_T: torch.Tensor, ctx: StepContext) -> torch.Tensor:
        """The residual stream after the last layer, [T, H]; keys and values are written to the cache on the way."""
        h, scaled = self.embed.embed(ids_T), None
        firsts = [attention.first for attention in self.attention]
        for attention, mlp, following in zip(self.attention, self.mlp, [*firsts[1:], None], strict=True):
            h, scaled = attention(h, ctx, scaled, mlp.first)
            h, scaled = mlp(h, scaled, following)
        return h

    def logits(self, h_TH: torch.Tensor) -> torch.Tensor:
        """Local logits [T, V] of the given rows of the residual stream."""
        return self.lm_head.logits(h_TH, self.norm.weight, self.eps)

    def slices(
        self, h_RH: torch.Tensor, state: SlotTensors, slots_R: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Each row's best noisy scores among the local ids, value and id [R, slices]."""
        return self.lm_head.slices(h_RH, self.norm.weight, self.eps, state, slots_R)


def rope_table(c: ModelConfig, length: int, device: torch.device) -> torch.Tensor:
    """fp32 [length, D]: cosines of the D/2 frequencies, then sines. Angles are computed in fp32, as in transformers."""
    exponent = torch.arange(0, c.head_dim, 2, dtype=torch.int64).float() / c.head_dim
    angles = torch.outer(torch.arange(length).float(), 1.0 / c.rope_theta**exponent)
    return torch.cat([angles.cos(), angles.sin()], -1).to(device)
