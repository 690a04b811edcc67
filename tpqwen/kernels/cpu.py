"""The CPU's side of ops.py: what kernels/reference.py specifies, with fewer copies and fewer passes over memory.

T tokens, B decode rows, R rows of one attention call, M table width, N query heads, K key/value heads, G = N / K,
D head size, P block size, S keys, H hidden, O and I a weight's rows and columns, F fused rows.
Caches are [blocks, K, P, D] as everywhere, but lie in memory as [K, blocks, P, D] (worker/kv_cache.py): the keys of one
head in consecutive blocks are then one matrix, and gathering scattered ones is a single copy. There are no padding rows
here: they exist for graphs. Sums are in another order than in the reference, so results differ by rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F

from tpqwen.kernels import draft_reference, reference
from tpqwen.kernels.context import PrefillRows, StepContext
from tpqwen.kernels.reference import Op, by_row

ONEDNN_FROM = 1 << 19  # elements of a weight; below, calling oneDNN costs more than it saves
CONVERTED_ELEMENTS = 1 << 20  # of an int8 weight at a time: its converted rows stay in the processor's cache
GATHER_ELEMENTS = 1 << 18  # 1 MiB of fp32: keys of one attention call over several rows
# What torch.compile calls. F.linear(x.to_mkldnn(), w).to_dense() is the public way: the same product and two copies.
_ONEDNN_LINEAR: Op | None = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def linear(x_TI: torch.Tensor, weight_OI: torch.Tensor, scale_O: torch.Tensor | None = None) -> torch.Tensor:
    """reference.linear. Large fp32 products go to oneDNN where PyTorch has it: MKL, its default for them, is up to
    three times slower on processors that MKL does not know (docs/LOG.md). So do int8 weights, converted some rows at a
    time; PyTorch's own int8 product takes four times as long for one row, seventy for 256."""
    if scale_O is not None:
        return _linear_int8(x_TI, weight_OI, scale_O)
    if _ONEDNN_LINEAR is not None and x_TI.dtype == torch.float32 and weight_OI.numel() >= ONEDNN_FROM:
        result: torch.Tensor = _ONEDNN_LINEAR(x_TI, weight_OI, None, "none", [], "")
        return result
    return F.linear(x_TI, weight_OI)


def _linear_int8(x_TI: torch.Tensor, weight_OI: torch.Tensor, scale_O: torch.Tensor) -> torch.Tensor:
    """The scales multiply the product: fewer numbers than the weight has, and int8 is exact in every dtype."""
    count = -(-weight_OI.numel() // CONVERTED_ELEMENTS)
    parts = [linear(x_TI, part.to(x_TI.dtype)) for part in weight_OI.chunk(count)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)).mul_(scale_O)


def rms_norm(x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
    """reference.rms_norm. The weight comes after the rounding, which F.rms_norm would do last."""
    return F.rms_norm(x_TH, weight_H.shape, None, eps).mul_(weight_H)


def silu_mul(gate_up_TF: torch.Tensor) -> torch.Tensor:
    """reference.silu_mul."""
    gate_TI, up_TI = gate_up_TF.chunk(2, dim=-1)
    return F.silu(gate_TI).mul_(up_TI)


norm_linear = reference.normed(rms_norm, linear)
norm_gate_up = reference.normed(rms_norm, linear, silu_mul)


def linear_add(
    x_TI: torch.Tensor, weight_HI: torch.Tensor, residual_TH: torch.Tensor, scale_H: torch.Tensor | None = None
) -> torch.Tensor:
    """reference.linear_add."""
    return linear(x_TI, weight_HI, scale_H).add_(residual_TH)


def attend(
    qkv_TF: torch.Tensor,
    q_norm_D: torch.Tensor,
    k_norm_D: torch.Tensor,
    eps: float,
    layer: int,
    ctx: StepContext,
    scale: float,
) -> torch.Tensor:
    """reference.attend."""
    return _attend(_plan_of(ctx), qkv_TF, q_norm_D, k_norm_D, eps, layer, ctx, scale)


def attend_by_token(
    qkv_TF: torch.Tensor,
    q_norm_D: torch.Tensor,
    k_norm_D: torch.Tensor,
    eps: float,
    layer: int,
    ctx: StepContext,
    scale: float,
) -> torch.Tensor:
    """reference.attend, each token by calls of its own, one after another."""
    plans, args = _token_plans(ctx), (q_norm_D, k_norm_D, eps, layer, ctx, scale)
    return torch.cat([_attend(plan, qkv_TF[t : t + 1].clone(), *args) for t, plan in enumerate(plans)])


def _attend(
    plan: Plan,
    qkv_TF: torch.Tensor,
    q_norm_D: torch.Tensor,
    k_norm_D: torch.Tensor,
    eps: float,
    layer: int,
    ctx: StepContext,
    scale: float,
) -> torch.Tensor:
    k_cache, v_cache = (c[layer].transpose(0, 1) for c in (ctx.k_cache, ctx.v_cache))  # [K, blocks, P, D]
    kv_heads, head_dim = k_cache.shape[0], k_cache.shape[3]
    heads_TXD = qkv_TF.view(len(qkv_TF), -1, head_dim)
    num_heads = heads_TXD.shape[1] - 2 * kv_heads
    normed_TXD = F.rms_norm(heads_TXD[:, : num_heads + kv_heads], (head_dim,), None, eps)
    normed_TXD[:, :num_heads] *= q_norm_D
    normed_TXD[:, num_heads:] *= k_norm_D
    q_TND, k_TKD = torch.split(plan.rotate(normed_TXD), [num_heads, kv_heads], dim=1)
    plan.write(k_cache, k_TKD)
    plan.write(v_cache, heads_TXD[:, num_heads + kv_heads :])
    out = torch.empty_like(q_TND, memory_format=torch.contiguous_format)
    for read in plan.reads:
        out[read.tokens] = read.attend(q_TND[read.tokens], k_cache, v_cache, scale)
    return out.flatten(1)


head_slices = reference.head_of(norm_linear, reference.noisy_slices)


@dataclass(frozen=True)
class Read:
    """One attention call: several decode rows, or the rows of one sequence, over the cached keys they may see."""

    tokens: slice  # which queries
    num_rows: int  # block tables read
    blocks: slice | torch.Tensor  # consecutive blocks of one table, read in place; or int64 [R * M], gathered
    length: int  # S
    mask: torch.Tensor | None  # bool, [R, 1, S] of decode rows, [T, S] of a chunk; None: every key
    causal: bool  # a whole prompt: keys up to each query's own

    def attend(self, q_TND: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, scale: float) -> torch.Tensor:
        """[T, N, D]. Caches [K, blocks, P, D]."""
        k_KRSD, v_KRSD = self._keys(k_cache, q_TND.dtype), self._keys(v_cache, q_TND.dtype)
        num_tokens, kv_heads = len(q_TND), len(k_KRSD)
        q_TKGD = q_TND.view(num_tokens, kv_heads, -1, q_TND.shape[2])
        if num_tokens == self.num_rows:  # the G queries of a key head stand as its query rows: no key is repeated
            mixed_KTGD = self._product(q_TKGD.transpose(0, 1), k_KRSD, v_KRSD, scale)
            return mixed_KTGD.transpose(0, 1).flatten(1, 2)
        group = q_TKGD.shape[2]
        k_KGSD, v_KGSD = (x.expand(-1, group, -1, -1) for x in (k_KRSD, v_KRSD))
        mixed_KGTD = self._product(q_TKGD.permute(1, 2, 0, 3), k_KGSD, v_KGSD, scale)
        return mixed_KGTD.permute(2, 0, 1, 3).flatten(1, 2)

    def _keys(self, cache: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """[K, R, S, D], a view where the blocks are consecutive."""
        found = cache[:, self.blocks] if isinstance(self.blocks, slice) else cache.index_select(1, self.blocks)
        return found.view(len(cache), self.num_rows, -1, cache.shape[3])[:, :, : self.length].to(dtype)

    def _product(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, is_causal=self.causal, scale=scale)


@dataclass(frozen=True)
class Plan:
    """What all layers of a step have in common, worked out once: the only place that reads numbers from tensors."""

    cos_T1D: torch.Tensor  # fp32, of all D dimensions
    sin_T1D: torch.Tensor  # fp32, of the D / 2 frequencies
    slots_T: torch.Tensor  # int64
    begun: torch.Tensor | None  # int64, blocks whose first position is written in this step
    reads: tuple[Read, ...]

    def rotate(self, x_TXD: torch.Tensor) -> torch.Tensor:
        """RoPE of every head, as reference.rotate."""
        x32 = x_TXD.float()
        first, second = x32.chunk(2, dim=-1)
        out = x32 * self.cos_T1D
        out_first, out_second = out.chunk(2, dim=-1)
        out_first.addcmul_(second, self.sin_T1D, value=-1)
        out_second.addcmul_(first, self.sin_T1D)
        return out.to(x_TXD.dtype)

    def write(self, cache: torch.Tensor, x_TKD: torch.Tensor) -> None:
        """Put every token into its slot. A block is cleared when it is begun: a sequence that ended may have left NaN
        in it, which no mask would keep out of the sums of a read beyond its length."""
        if self.begun is not None:
            cache.index_fill_(1, self.begun, 0)
        cache.view(len(cache), -1, cache.shape[3]).index_copy_(1, self.slots_T, x_TKD.transpose(0, 1).to(cache.dtype))


_plans: WeakKeyDictionary[StepContext, Plan] = WeakKeyDictionary()


def _plan_of(ctx: StepContext) -> Plan:
    plan = _plans.get(ctx)
    if plan is None:
        plan = _plans[ctx] = make_plan(ctx)
    return plan


def make_plan(ctx: StepContext) -> Plan:
    """The step's rotations, slots and attention calls."""
    _, kv_heads, block_size, head_dim = ctx.k_cache[0].shape
    lengths, tables_BM = ctx.decode_lengths_B.tolist(), ctx.tables_SM[ctx.decode_slots_B]
    step = max(1, GATHER_ELEMENTS // (max(lengths, default=1) * kv_heads * head_dim))
    decode = (
        _decode_read(slice(i, min(i + step, len(lengths))), tables_BM, lengths, block_size)
        for i in range(0, len(lengths), step)
    )
    chunks = _chunk_reads(ctx.prefill, len(lengths), block_size) if ctx.prefill is not None else ()
    return _plan(ctx, slice(None), (*decode, *chunks))


def _plan(ctx: StepContext, tokens: slice, reads: tuple[Read, ...]) -> Plan:
    """The plan of some of the step's tokens."""
    block_size, slots = ctx.k_cache[0].shape[2], ctx.cache_slots_T[tokens]
    cos_TD, sin_TD = ctx.cos_sin.index_select(0, ctx.positions_T[tokens]).chunk(2, dim=-1)
    begun = slots[slots % block_size == 0] // block_size
    return Plan(
        cos_T1D=torch.cat((cos_TD, cos_TD), dim=-1)[:, None],
        sin_T1D=sin_TD[:, None],
        slots_T=slots,
        begun=begun if len(begun) else None,
        reads=reads,
    )


def _token_plans(ctx: StepContext) -> Iterator[Plan]:
    """A plan for each token, whose keys are always gathered: what lies where must not matter either."""
    block_size, tables = ctx.k_cache[0].shape[2], list(ctx.tables_SM[ctx.decode_slots_B])
    if ctx.prefill is not None:
        for table_M, count in zip(ctx.prefill.tables_CM, ctx.prefill.num_query, strict=True):
            tables += [table_M] * count
    for t, (table_M, position) in enumerate(zip(tables, ctx.positions_T.tolist(), strict=True)):
        blocks = table_M[: position // block_size + 1].long()
        yield _plan(ctx, slice(t, t + 1), (Read(slice(0, 1), 1, blocks, position + 1, mask=None, causal=False),))


def _decode_read(rows: slice, tables_BM: torch.Tensor, lengths: list[int], block_size: int) -> Read:
    """Decode rows of one attention call. Table entries beyond a row's length may be stale: its first block stands in
    for them, whose content, unlike theirs, is the row's own."""
    lengths_R = torch.tensor(lengths[rows])
    num_rows, longest = len(lengths_R), max(lengths[rows])
    tables_RM = tables_BM[rows, : -(-longest // block_size)].long()
    if num_rows == 1:
        return Read(rows, 1, _consecutive(tables_RM[0]), longest, mask=None, causal=False)
    owned_RM = torch.arange(tables_RM.shape[1]) * block_size < lengths_R[:, None]
    blocks = torch.where(owned_RM, tables_RM, tables_RM[:, :1]).flatten()
    mask_R1S = (torch.arange(longest) < lengths_R[:, None])[:, None]
    return Read(rows, num_rows, blocks, longest, mask_R1S, causal=False)


def _chunk_reads(rows: PrefillRows, first_token: int, block_size: int) -> Iterator[Read]:
    """One attention call for each chunk."""
    for table_M, count, length in zip(rows.tables_CM, rows.num_query, rows.num_context, strict=True):
        whole = count == length and count > 1
        mask = None if whole or count == 1 else torch.ones(count, length, dtype=torch.bool).tril(length - count)
        blocks = _consecutive(table_M[: -(-length // block_size)].long())
        yield Read(slice(first_token, first_token + count), 1, blocks, length, mask, causal=whole)
        first_token += count


def _consecutive(table_M: torch.Tensor) -> slice | torch.Tensor:
    """The table as a range of blocks if it is one."""
    first, width = int(table_M[0]), len(table_M)
    return slice(first, first + width) if torch.equal(table_M, torch.arange(first, first + width)) else table_M


OPERATIONS: dict[str, Op] = {
    "rms_norm": rms_norm,
    "linear": linear,
    "norm_linear": norm_linear,
    "norm_gate_up": norm_gate_up,
    "linear_add": linear_add,
    "attend": attend,
    "head_slices": head_slices,
    "begin_drafts": draft_reference.begin_drafts,
    "accept_drafts": draft_reference.accept_drafts,
}
# Each row, and each token's attention, by calls of its own. Products of one row and of several differ in the last bits.
INVARIANT: dict[str, Op] = {
    "rms_norm": by_row(rms_norm, 0),
    "linear": by_row(linear, 0),
    "norm_linear": by_row(norm_linear, 0),
    "norm_gate_up": by_row(norm_gate_up, 0),
    "linear_add": by_row(linear_add, 0, 2),
    "attend": attend_by_token,
    "head_slices": by_row(head_slices, 0, 5),
    "noisy_slices": by_row(reference.noisy_slices, 0, 2),
    "choose": by_row(reference.choose, 0, 1, 3),
    "log_sum_exp": by_row(reference.log_sum_exp, 0),
    "top_candidates": reference.ranked_candidates,
}
