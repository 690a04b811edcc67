"""The training loop: Muon for the layers' matrices, AdamW for the rest, learning rates by the share of the run done."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from embedded.corpus import TARGET
from embedded.feed import Feed
from embedded.network import Qwen3

MATRIX_RATE, VECTOR_RATE = 3e-3, 2e-3  # peaks; Muon's updates are scaled to AdamW's size
MATRIX_DECAY = 0.05
FLAT_SHARE = 0.35  # of the run at the peak, then linear to zero
WARMUP_STEPS = 60  # or a tenth of a run by steps
CLIP_NORM = 1.0
ID_MASK = 0x0FFF


STAGES = ((512, 0.7), (2048, 1.0))  # tokens read of each row, and the share of the run at which the stage ends


@dataclass(frozen=True)
class Plan:
    """How long and how large. Either seconds or steps ends the run, whichever is given."""

    seconds: float | None
    steps: int | None
    step_tokens: int
    pass_tokens: int  # per forward pass
    compiled: bool
    report_s: float = 5.0


@dataclass(frozen=True)
class Stage:
    """A part of the run with rows of one length; it ends at a share of the run."""

    feed: Feed
    row_tokens: int
    until: float

    def batch(self, plan: Plan, device: torch.device) -> tuple[Tensor, Tensor]:
        """(ids, targets) [rows, row_tokens] int64."""
        rows = self.feed.rows(max(1, plan.step_tokens // self.row_tokens))
        return inputs_and_targets(torch.from_numpy(rows.view(np.int16)).to(device))

    def micro_rows(self, plan: Plan) -> int:
        """Rows per forward pass."""
        return max(1, plan.pass_tokens // self.row_tokens)


@dataclass(frozen=True)
class Outcome:
    """What a run did. tokens: read in all; new_tokens: of rows that were made for it."""

    steps: int
    tokens: int
    new_tokens: int
    seconds: float
    losses: list[tuple[int, float]]


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


def loss_function(model: Qwen3, plan: Plan, stages: list[Stage]) -> Callable[[Tensor, Tensor], Tensor]:
    """model.loss, compiled if that works here, and warmed up, so that the clock starts with everything built."""
    device = next(model.parameters()).device
    samples = [(stage.batch(plan, device), stage.micro_rows(plan)) for stage in stages]
    if plan.compiled:
        try:
            compiled = torch.compile(model.loss, dynamic=False)
            for batch, micro_rows in samples:
                forward_backward(compiled, batch, micro_rows)
            model.zero_grad(set_to_none=True)
            return compiled
        except Exception as error:  # whatever the compiler lacks here, plain torch does the same work
            print(f"torch.compile does not work here ({type(error).__name__}: {error}); going on without", flush=True)
    for batch, micro_rows in samples:
        forward_backward(model.loss, batch, micro_rows)
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


def train(model: Qwen3, stages: list[Stage], plan: Plan) -> Outcome:
    """Trains model in place. Prints a line every plan.report_s seconds."""
    device = next(model.parameters()).device
    loss_of = loss_function(model, plan, stages)
    optimising = optimisers(model)
    started = reported = time.monotonic()
    losses: list[tuple[int, float]] = []
    step, tokens, elapsed = 0, 0, 0.0
    while (plan.steps is None or step < plan.steps) and (plan.seconds is None or elapsed < plan.seconds):
        done = max(step / plan.steps if plan.steps else 0.0, elapsed / plan.seconds if plan.seconds else 0.0)
        stage = next(stage for stage in stages if done < stage.until)
        ids, targets = stage.batch(plan, device)
        loss = forward_backward(loss_of, (ids, targets), stage.micro_rows(plan))
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        advance(optimising, rate(step, done, plan.steps))
        step, tokens = step + 1, tokens + ids.numel()
        if device.type == "cuda" and step % 8 == 0:
            torch.cuda.synchronize()  # the clock decides when to stop: the queue must not run far ahead of it
        elapsed = time.monotonic() - started
        if time.monotonic() - reported > plan.report_s or step == 1:
            reported = time.monotonic()
            losses.append((step, finite(loss, step)))
            print(f"step {step} loss {losses[-1][1]:.4f} {elapsed:.0f} s {tokens / elapsed:,.0f} tokens/s", flush=True)
    losses.append((step, finite(loss, step)))
    new_tokens = sum(stage.feed.new_tokens for stage in stages)
    return Outcome(step, tokens, new_tokens, time.monotonic() - started, losses)


def advance(optimising: list[torch.optim.Optimizer], factor: float) -> None:
    """One step of all optimisers at factor times their peak rates; the gradients are used up."""
    for optimiser in optimising:
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * factor
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)


def finite(loss: Tensor, step: int) -> float:
    """The loss as a number. Raises FloatingPointError if it is none: the run is lost."""
    value = loss.item()
    if not math.isfinite(value):
        raise FloatingPointError(f"the loss is {value} at step {step}")
    return value


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
