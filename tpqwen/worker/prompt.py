"""What a prompt itself tells: log-probabilities of its tokens, and its last position's hidden state.

T prefill tokens, H hidden, R sampled rows, V this rank's vocabulary shard.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tpqwen.kernels import ops
from tpqwen.model.qwen3 import Qwen3
from tpqwen.request import TokenLogprob
from tpqwen.step import RowParams
from tpqwen.worker.batch import ChunkBatch, to_device, to_host
from tpqwen.worker.sampler import LogprobTensors, Sampler

ROWS_AT_ONCE = 64  # positions whose logits exist at one time: a long chunk's would not fit beside the cache


@dataclass(frozen=True)
class PromptScores:
    """Of one chunk, in slices."""

    chunk: int
    wanted: int
    slices: list[LogprobTensors]

    def to_host(self) -> PromptScores:
        """As worker/batch.py: to_host."""
        return PromptScores(self.chunk, self.wanted, [s.to_host() for s in self.slices])

    def tokens(self) -> list[TokenLogprob]:
        """One for each target; on the host."""
        return [t for s in self.slices for _, t in s.rows([self.wanted] * s.chosen.shape[0])]


@dataclass(frozen=True)
class Pooled:
    """Numbers for the rows with params.pooling, fp32."""

    hidden: torch.Tensor | None  # [R, H], after the last norm
    logprobs: torch.Tensor | None  # [R, most ids]

    def to_host(self) -> Pooled:
        """As worker/batch.py: to_host."""
        return Pooled(*(None if x is None else to_host(x) for x in (self.hidden, self.logprobs)))

    def rows(self, params: tuple[RowParams, ...]) -> tuple[tuple[int, bytes], ...]:
        """(row, float32 bytes); on the host."""
        out = []
        for row, p in enumerate(params):
            if p.pooling is not None:
                wanted = len(p.pooling.ids)
                values = self.logprobs[row, :wanted] if wanted and self.logprobs is not None else None
                values = self.hidden[row] if values is None and self.hidden is not None else values
                assert values is not None
                out.append((row, values.numpy().tobytes()))
        return tuple(out)


def score_prompts(
    model: Qwen3, sampler: Sampler, hidden_TH: torch.Tensor, chunks: ChunkBatch
) -> tuple[PromptScores, ...]:
    """Log-probabilities of every target of the chunks. hidden_TH: the residual stream of the prefill tokens."""
    out: list[PromptScores] = []
    start = 0
    if chunks.targets is None:
        return ()
    for c in chunks.scored:
        slices = []
        for at in range(0, c.num_targets, ROWS_AT_ONCE):
            count = min(ROWS_AT_ONCE, c.num_targets - at)
            logits = model.logits(hidden_TH[c.first + at : c.first + at + count])
            slices.append(sampler.logprobs(logits, chunks.targets[start + at : start + at + count], c.wanted))
        out.append(PromptScores(c.index, c.wanted, slices))
        start += c.num_targets
    return tuple(out)


def pool(
    model: Qwen3, sampler: Sampler, hidden_RH: torch.Tensor, logits_RV: torch.Tensor, params: tuple[RowParams, ...]
) -> Pooled | None:
    """What the rows' pooling asks for; None when no row has any. Every rank takes part alike."""
    pooling = [p.pooling for p in params]
    asked = [p for p in pooling if p is not None]
    if not asked:
        return None
    hidden = logprobs = None
    if not all(p.ids for p in asked):
        hidden = ops.rms_norm(hidden_RH, model.norm.weight, model.eps, invariant=model.invariant).float()
    most = max(len(p.ids) for p in asked)
    if most:
        ids = [[*(p.ids if p else ()), *[0] * most][:most] for p in pooling]
        columns = to_device(ids, torch.int64, logits_RV.device).unbind(1)
        logprobs = torch.stack([sampler.logprobs(logits_RV, column, 0).chosen for column in columns], 1)
    return Pooled(hidden, logprobs)
