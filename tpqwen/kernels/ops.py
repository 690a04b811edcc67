"""One public function per operation, the only import site of the kernels: Triton on CUDA, cpu.py on CPUs.

Shapes and meaning of each are in kernels/reference.py, which is the specification, and does what neither has; those of
speculation in kernels/draft_reference.py.
invariant: bits of a row that depend on its own sequence alone (kernels/invariant.py, cpu.py's INVARIANT), at a price.
A weight is of the activations' dtype, or int8 and comes with a scale, fp32, one number for each of its rows.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module

import torch

from tpqwen.kernels import cpu, reference
from tpqwen.kernels.context import DecodeInputs, DraftInputs, NormedProduct, Scaled, SlotTensors, StepContext
from tpqwen.kernels.mailbox import Mailbox
from tpqwen.kernels.reference import Op


@cache
def _cuda(module: str) -> dict[str, Op]:
    """Operations with a Triton version. Imported on first use: machines without a GPU need no Triton."""
    table: dict[str, Op] = import_module(f"tpqwen.kernels.{module}").OPERATIONS
    return table


def _pick(name: str, x: torch.Tensor, invariant: bool = False) -> Op:
    tables = [_cuda("cuda") if x.is_cuda else cpu.OPERATIONS]
    if invariant:
        tables.insert(0, _cuda("invariant") if x.is_cuda else cpu.INVARIANT)
    op: Op = next((t[name] for t in tables if name in t), None) or getattr(reference, name)
    return op


def linear(
    x_TI: torch.Tensor, weight_OI: torch.Tensor, scale_O: torch.Tensor | None = None, *, invariant: bool = False
) -> torch.Tensor:
    """x W^T."""
    result: torch.Tensor = _pick("linear", x_TI, invariant)(x_TI, weight_OI, scale_O)
    return result


def rms_norm(x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float, *, invariant: bool = False) -> torch.Tensor:
    """RMSNorm over the last axis."""
    result: torch.Tensor = _pick("rms_norm", x_TH, invariant)(x_TH, weight_H, eps)
    return result


def norm_linear(
    h_TH: torch.Tensor,
    norm_H: torch.Tensor,
    eps: float,
    weight_OH: torch.Tensor,
    scale_O: torch.Tensor | None = None,
    *,
    scaled: Scaled | None = None,
    invariant: bool = False,
) -> torch.Tensor:
    """RMSNorm, then x W^T. scaled: what linear_add_scaled gave with the rows for this product."""
    known = {} if scaled is None else {"scaled": scaled}
    result: torch.Tensor = _pick("norm_linear", h_TH, invariant)(h_TH, norm_H, eps, weight_OH, scale_O, **known)
    return result


def norm_gate_up(
    h_TH: torch.Tensor,
    norm_H: torch.Tensor,
    eps: float,
    weight_FH: torch.Tensor,
    scale_F: torch.Tensor | None = None,
    *,
    scaled: Scaled | None = None,
    invariant: bool = False,
) -> torch.Tensor:
    """RMSNorm, then silu(gate) * up. scaled: as above."""
    known = {} if scaled is None else {"scaled": scaled}
    result: torch.Tensor = _pick("norm_gate_up", h_TH, invariant)(h_TH, norm_H, eps, weight_FH, scale_F, **known)
    return result


def linear_add(
    x_TI: torch.Tensor,
    weight_HI: torch.Tensor,
    residual_TH: torch.Tensor,
    scale_H: torch.Tensor | None = None,
    *,
    invariant: bool = False,
) -> torch.Tensor:
    """residual + x W^T. The residual may be overwritten: use only what is returned."""
    result: torch.Tensor = _pick("linear_add", x_TI, invariant)(x_TI, weight_HI, residual_TH, scale_H)
    return result


def linear_add_scaled(
    x_TI: torch.Tensor,
    weight_HI: torch.Tensor,
    residual_TH: torch.Tensor,
    scale_H: torch.Tensor | None,
    following: NormedProduct,
    *,
    invariant: bool = False,
) -> tuple[torch.Tensor, Scaled | None]:
    """linear_add, and with it what the following product of these rows should be given: most of its norm, or None."""
    if invariant or not x_TI.is_cuda:
        return linear_add(x_TI, weight_HI, residual_TH, scale_H, invariant=invariant), None
    h_TH, scaled = _cuda("cuda")["linear_add_scaled"](x_TI, weight_HI, residual_TH, scale_H, following)
    return h_TH, scaled


def attend(
    qkv_TF: torch.Tensor,
    q_norm_D: torch.Tensor,
    k_norm_D: torch.Tensor,
    eps: float,
    layer: int,
    ctx: StepContext,
    scale: float,
    *,
    invariant: bool = False,
) -> torch.Tensor:
    """QK-norm, RoPE, KV write and attention of decode rows and chunks: [T, N * D]. The seam for fused kernels."""
    result: torch.Tensor = _pick("attend", qkv_TF, invariant)(qkv_TF, q_norm_D, k_norm_D, eps, layer, ctx, scale)
    return result


def begin_step(state: SlotTensors, slots_B: torch.Tensor, block_size: int) -> DecodeInputs:
    """Count a pass and advance its decode rows; every pass begins with it."""
    result: DecodeInputs = _pick("begin_step", slots_B)(state, slots_B, block_size)
    return result


def noisy_slices(
    logits_RV: torch.Tensor, state: SlotTensors, slots_R: torch.Tensor, first_id: int, *, invariant: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Best of logits / T + noise, and its global id, per row and slice of the vocabulary."""
    value, token = _pick("noisy_slices", logits_RV, invariant)(logits_RV, state, slots_R, first_id)
    return value, token


def head_slices(
    h_RH: torch.Tensor,
    norm_H: torch.Tensor,
    eps: float,
    weight_VH: torch.Tensor,
    state: SlotTensors,
    slots_R: torch.Tensor,
    first_id: int,
    num_valid: int,
    *,
    invariant: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """noisy_slices straight from the residual stream."""
    op = _pick("head_slices", h_RH, invariant)
    value, token = op(h_RH, norm_H, eps, weight_VH, state, slots_R, first_id, num_valid)
    return value, token


def best_slice(value_RS: torch.Tensor, id_RS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's best slice."""
    return reference.best_slice(value_RS, id_RS)


def choose(
    values_RC: torch.Tensor, ids_RC: torch.Tensor, state: SlotTensors, slots_R: torch.Tensor, *, invariant: bool = False
) -> torch.Tensor:
    """One of each row's candidates, by its slot's top-k, top-p and min-p: ids [R]."""
    result: torch.Tensor = _pick("choose", values_RC, invariant)(values_RC, ids_RC, state, slots_R)
    return result


def log_sum_exp(logits_RV: torch.Tensor, *, invariant: bool = False) -> torch.Tensor:
    """log of each row's sum of exponentials, [R]."""
    result: torch.Tensor = _pick("log_sum_exp", logits_RV, invariant)(logits_RV)
    return result


def finish_step(
    state: SlotTensors,
    slots_R: torch.Tensor,
    value_RS: torch.Tensor,
    id_RS: torch.Tensor,
    candidates: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """Settle the rows' tokens, int32 [R], in their slots and in the ring; every pass that samples ends with it."""
    result: torch.Tensor = _pick("finish_step", slots_R)(state, slots_R, value_RS, id_RS, candidates)
    return result


def begin_drafts(state: SlotTensors, slots_B: torch.Tensor, block_size: int, count: int) -> DraftInputs:
    """Count a pass and draft tokens for its rows; every speculative pass begins with it."""
    result: DraftInputs = _pick("begin_drafts", slots_B)(state, slots_B, block_size, count)
    return result


def accept_drafts(state: SlotTensors, slots_B: torch.Tensor, ids: torch.Tensor, tokens: torch.Tensor) -> None:
    """Advance the rows by the drafted tokens that were right and one more; every speculative pass ends with it."""
    _pick("accept_drafts", slots_B)(state, slots_B, ids, tokens)


def edit_slots(tables_SM: torch.Tensor, edits_E3: torch.Tensor) -> None:
    """Set block table entries: (slot, index, block) each."""
    _pick("edit_slots", tables_SM)(tables_SM, edits_E3)


def set_rows(rows: torch.Tensor, slots_B: torch.Tensor, padding: int) -> None:
    """Make these the slots that decode."""
    _pick("set_rows", rows)(rows, slots_B, padding)


def add_up_peers(mailbox: Mailbox, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
    """reference.add_up of all ranks' x, written over x. GPUs only, like the two below."""
    result: torch.Tensor = _cuda("cuda")["add_up_peers"](mailbox, x, residual)
    return result


def gather_peers(mailbox: Mailbox, x: torch.Tensor) -> torch.Tensor:
    """All ranks' x, one above the other."""
    result: torch.Tensor = _cuda("cuda")["gather_peers"](mailbox, x)
    return result


def compile_exchange(
    mailbox: Mailbox, x: torch.Tensor, residual: torch.Tensor | None = None, *, summed: bool = True
) -> None:
    """Compile what the two above launch for such tensors, and run nothing."""
    _cuda("cuda")["compile_exchange"](mailbox, x, residual, summed=summed)


def top_candidates(
    logits_RV: torch.Tensor, count: int, *, invariant: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` largest logits of each row, best first, with their local ids (int64)."""
    values, ids = _pick("top_candidates", logits_RV, invariant)(logits_RV, count)
    return values, ids
