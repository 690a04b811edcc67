"""The training loop: Muon for the layers' matrices, AdamW for the rest, learning rates by the share of the run done."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from embedded.corpus import TARGET
from embedded.network import Qwen3

MATRIX_RATE, VECTOR_RATE = 3e-3, 2e-3  # peaks; Muon's updates are scaled to AdamW's size
MATRIX_DECAY = 0.05
FLAT_SHARE = 0.35  # of the run at the peak, then linear to zero
WARMUP_STEPS = 60  # or a tenth of a run by steps
CLIP_NORM = 1.0
ID_MASK = 0x0FFF


@dataclass(frozen=True)
class Plan:
    """How long and how large. Either seconds or steps ends the run, whichever is given."""

    seconds: float | None
    steps: int | None
    rows: int  # per step
    micro_rows: int  # per forward pass
    seed: int
    compiled: bool
    report_s: float = 5.0


@dataclass(frozen=True)
class Outcome:
    """What a run did."""

    steps: int
    tokens: int
    seconds: float
    losses: list[tuple[int, float]]


def batches(rows: np.ndarray, number: int, seed: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (ids, targets) [number, T] int64; each pass over rows has an order of its own. rows [R, T + 1] uint16."""
    resident = torch.from_numpy(np.ascontiguousarray(rows).view(np.int16)).to(device)
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(rows), generator=generator).to(device)
        if len(rows) < number:
            order = order.repeat(-(-number // len(rows)))
        for start in range(0, len(order) - number + 1, number):
            yield inputs_and_targets(resident[order[start : start + number]])


def inputs_and_targets(rows: Tensor) -> tuple[Tensor, Tensor]:
    """int16 rows as (ids, targets); the mark TARGET is the sign bit, -100 stands where there is no loss."""
    ids = (rows & ID_MASK).long()
    return ids[:, :-1], torch.where(rows < 0, ids, -100)[:, 1:]


def optimisers(model: Qwen3) -> list[torch.optim.Optimizer]:
    """Muon and AdamW with their peak rates noted in each group; on a CPU AdamW alone, Muon's bf16 is too slow there."""
    on_gpu = model.model.embed_tokens.weight.is_cuda
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2 and on_gpu]
    chosen = set(matrices)
    rest = [p for p in model.parameters() if p not in chosen]
    adam = torch.optim.AdamW(rest, lr=VECTOR_RATE, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0, fused=on_gpu)
    found: list[torch.optim.Optimizer] = [adam]
    if matrices:
        muon = torch.optim.Muon(matrices, lr=MATRIX_RATE, weight_decay=MATRIX_DECAY, adjust_lr_fn="match_rms_adamw")
        found.append(muon)
    for optimiser in found:
        for group in optimiser.param_groups:
            group["peak"] = group["lr"]
    return found


def rate(step: int, done: float, steps: int | None = None) -> float:
    """Factor of the peak rate: warm-up, flat, then linear to zero. done is the share of the run, 0 to 1."""
    warmup = min(WARMUP_STEPS, steps // 10 + 1) if steps else WARMUP_STEPS
    return min(1.0, (step + 1) / warmup) * min(1.0, max(0.0, (1 - done) / (1 - FLAT_SHARE)))


def loss_function(model: Qwen3, plan: Plan, sample: tuple[Tensor, Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """model.loss, compiled if that works here, and warmed up, so that the clock starts with everything built."""
    if plan.compiled:
        try:
            compiled = torch.compile(model.loss, dynamic=False)
            forward_backward(compiled, sample, plan.micro_rows)
            model.zero_grad(set_to_none=True)
            return compiled
        except Exception as error:  # whatever the compiler lacks here, plain torch does the same work
            print(f"torch.compile does not work here ({type(error).__name__}: {error}); going on without", flush=True)
    forward_backward(model.loss, sample, plan.micro_rows)
    model.zero_grad(set_to_none=True)
    return model.loss


def forward_backward(
    loss_of: Callable[[Tensor, Tensor], Tensor], batch: tuple[Tensor, Tensor], micro_rows: int
) -> Tensor:
    """Adds the gradients of a batch, micro_rows at a time. Returns the mean loss, on the device."""
    ids, targets = batch
    number = (targets >= 0).sum().clamp(min=1)
    total = torch.zeros((), device=ids.device)
    for ids_part, targets_part in zip(ids.split(micro_rows), targets.split(micro_rows), strict=True):
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda):
            loss = loss_of(ids_part, targets_part) / number
        loss.backward()
        total += loss.detach()
    return total


def train(model: Qwen3, rows: np.ndarray, plan: Plan) -> Outcome:
    """Trains model in place on rows [R, T + 1]. Prints a line every plan.report_s seconds."""
    device = next(model.parameters()).device
    stream = batches(rows, plan.rows, plan.seed, device)
    loss_of = loss_function(model, plan, next(stream))
    optimising = optimisers(model)
    started = reported = time.monotonic()
    losses: list[tuple[int, float]] = []
    step, elapsed = 0, 0.0
    while (plan.steps is None or step < plan.steps) and (plan.seconds is None or elapsed < plan.seconds):
        done = max(step / plan.steps if plan.steps else 0.0, elapsed / plan.seconds if plan.seconds else 0.0)
        loss = forward_backward(loss_of, next(stream), plan.micro_rows)
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        for optimiser in optimising:
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * rate(step, done, plan.steps)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        step += 1
        if device.type == "cuda" and step % 8 == 0:
            torch.cuda.synchronize()  # the clock decides when to stop: the queue must not run far ahead of it
        elapsed = time.monotonic() - started
        if time.monotonic() - reported > plan.report_s or step == 1:
            reported = time.monotonic()
            if not math.isfinite(loss.item()):
                raise FloatingPointError(f"the loss is {loss.item()} at step {step}")
            losses.append((step, loss.item()))
            speed = step * plan.rows * (rows.shape[1] - 1) / elapsed
            print(f"step {step} loss {loss.item():.4f} {elapsed:.0f} s {speed:,.0f} tokens/s", flush=True)
    losses.append((step, loss.item()))
    return Outcome(step, step * plan.rows * (rows.shape[1] - 1), time.monotonic() - started, losses)


@torch.no_grad()
def mean_loss(model: Qwen3, rows: np.ndarray) -> float:
    """Loss in nats per target over rows, in the weights' own precision."""
    device = next(model.parameters()).device
    total = count = 0.0
    for start in range(0, len(rows), 4):
        part = torch.from_numpy(np.ascontiguousarray(rows[start : start + 4]).view(np.int16)).to(device)
        ids, targets = inputs_and_targets(part)
        number = int((targets >= 0).sum())
        if number:
            total += model.loss(ids, targets).item()
            count += number
    return total / max(count, 1.0)


assert TARGET == 0x8000  # the sign bit of int16
