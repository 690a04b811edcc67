"""From local logits to one token per row, the same on every rank, without gathering logits on the ordinary path.

R rows, V this rank's vocabulary shard, G ranks, C candidates. One rule for all paths: the token is the arg-max of
logit / T + noise over the allowed ids, where noise is a function of (seed, choice, output index, id) alone and the
allowed ids are what top-k, then top-p over those, then min-p leave. So the path taken never changes the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tpqwen.kernels import ops
from tpqwen.parallel.group import TPGroup
from tpqwen.request import TokenLogprob
from tpqwen.step import RowParams
from tpqwen.worker.slots import RowTensors

MAX_CANDIDATES = 64
NEVER = float("-inf")


@dataclass(frozen=True)
class SampleKind:
    """Which work a set of rows needs; part of a graph's identity. Rows of one kind may ride in a larger one."""

    candidates: bool = False  # some row has 0 < top_k <= MAX_CANDIDATES
    full: bool = False  # some row truncates without a small top_k: whole rows are gathered
    edits: bool = False  # penalties, bias or min_tokens change some row's logits
    logprobs: bool = False

    @property
    def in_graph(self) -> bool:
        """The rest takes host decisions and runs after the graph."""
        return not (self.full or self.edits or self.logprobs)


def kind_of(rows: Sequence[RowParams]) -> SampleKind:
    """The least kind that serves all rows."""
    sampled = [p for p in rows if p.temperature >= 1e-5]
    return SampleKind(
        candidates=any(_small(p) for p in sampled),
        full=any(_truncates(p) and not _small(p) for p in sampled),
        edits=any(p.needs_history or p.logit_bias or p.min_tokens for p in rows),
        logprobs=any(p.logprobs >= 0 for p in rows),
    )


def _small(p: RowParams) -> bool:
    return 0 < p.top_k <= MAX_CANDIDATES


def _truncates(p: RowParams) -> bool:
    return p.top_k > 0 or p.top_p < 1.0 or p.min_p > 0.0


@dataclass(frozen=True)
class LogprobTensors:
    """Still on the device: chosen [R], top [R, n] with ids [R, n], best first."""

    chosen: torch.Tensor
    top: torch.Tensor
    top_ids: torch.Tensor

    def rows(self, counts: list[int]) -> list[tuple[int, TokenLogprob]]:
        """On the host, for the rows that asked (counts[r] >= 0)."""
        chosen, top, ids = self.chosen.tolist(), self.top.tolist(), self.top_ids.tolist()
        return [(r, TokenLogprob(chosen[r], ids[r][:n], top[r][:n])) for r, n in enumerate(counts) if n >= 0]


class Sampler:
    """Sampling of one rank. first_id: global id of the shard's first row. num_valid: ids from there on are padding."""

    def __init__(self, group: TPGroup, first_id: int, num_valid: int) -> None:
        self._group = group
        self._first_id = first_id
        self._num_valid = num_valid

    def sample(
        self, logits_RV: torch.Tensor, rows: RowTensors, out_index: torch.Tensor, kind: SampleKind
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """logits fp32 or bf16 with padding ids at -inf -> (token ids int32 [R], bad bool [R]). bad: NaN or +Inf in the
        row, or nothing allowed in it; its token is 0."""
        noise = (rows.seed, rows.choice, out_index)
        value, token = ops.noisy_argmax(logits_RV, rows.temperature, *noise, self._first_id)
        value, token = self._best(value, token)
        bad = ~torch.isfinite(value)
        if kind.candidates:
            some = self._from_candidates(logits_RV, rows, noise)
            token = torch.where(
                (rows.temperature >= 1e-5) & (rows.top_k > 0) & (rows.top_k <= MAX_CANDIDATES), some, token
            )
        if kind.full:
            whole = self._from_full(logits_RV, rows, noise)
            truncates = (rows.top_k > MAX_CANDIDATES) | ((rows.top_k == 0) & ((rows.top_p < 1.0) | (rows.min_p > 0.0)))
            token = torch.where((rows.temperature >= 1e-5) & truncates, whole, token)
        return torch.where(bad, 0, token).to(torch.int32), bad

    def _best(self, value: torch.Tensor, token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The best (value, id) over the ranks; one gather of 2R numbers. NaN on any rank wins, so that it is seen."""
        if self._group.size == 1:
            return value, token
        pair = torch.stack([value.to(torch.float64), token.to(torch.float64)])
        values, tokens = self._group.all_gather(pair).unbind(1)  # [G, R] each
        best = torch.where(torch.isnan(values), float("inf"), values).argmax(0, keepdim=True)
        return values.gather(0, best)[0], tokens.gather(0, best)[0].long()

    def _from_candidates(
        self, logits_RV: torch.Tensor, rows: RowTensors, noise: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        """Exact for top_k <= MAX_CANDIDATES: each rank's best MAX_CANDIDATES hold the global ones."""
        values, ids = ops.top_candidates(logits_RV, min(MAX_CANDIDATES, logits_RV.shape[-1]))
        values, ids = values.float(), ids + self._first_id
        if self._group.size > 1:
            values, ids = self._merged(values, ids)
        return _choose(values, ids, rows, noise)

    def _from_full(self, logits_RV: torch.Tensor, rows: RowTensors, noise: tuple[torch.Tensor, ...]) -> torch.Tensor:
        logits = self.full_logits(logits_RV)
        values, ids = logits.sort(dim=-1, descending=True, stable=True)
        return _choose(values, ids, rows, noise)

    def full_logits(self, logits_RV: torch.Tensor) -> torch.Tensor:
        """All ranks' shards side by side, fp32 [R, G * V]."""
        if self._group.size == 1:
            return logits_RV.float()
        return self._group.all_gather(logits_RV.float()).transpose(0, 1).flatten(1)

    def logprobs(self, logits_RV: torch.Tensor, tokens: torch.Tensor, wanted: int) -> LogprobTensors:
        """Of the model's own distribution: the chosen token's and the `wanted` likeliest, global ids."""
        logits = logits_RV.float()
        mine = (tokens.long() - self._first_id).clamp(0, logits.shape[1] - 1)
        owned = (tokens >= self._first_id) & (tokens < self._first_id + logits.shape[1])
        chosen = torch.where(owned, logits.gather(1, mine[:, None])[:, 0], NEVER)
        lse = torch.logsumexp(logits, -1)
        values, ids = ops.top_candidates(logits, min(max(wanted, 1), logits.shape[1]))
        ids = ids + self._first_id
        if self._group.size > 1:
            lse = torch.logsumexp(self._group.all_gather(lse), 0)
            chosen = self._group.all_gather(chosen).amax(0)
            values, ids = self._merged(values, ids)
        return LogprobTensors(chosen - lse, values - lse[:, None], ids)

    def _merged(self, values_RC: torch.Tensor, ids_RC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """All ranks' candidates [R, G * C], best first; equal values keep rank order, so the lowest id leads."""
        values = self._group.all_gather(values_RC).transpose(0, 1).flatten(1)
        ids = self._group.all_gather(ids_RC).transpose(0, 1).flatten(1)
        values, order = values.sort(dim=-1, descending=True, stable=True)
        return values, ids.gather(1, order)


def _choose(
    values_RC: torch.Tensor, ids_RC: torch.Tensor, rows: RowTensors, noise: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    """values sorted downwards. Top-k, top-p over what is left, min-p; then the noisy arg-max. Returns ids int64 [R]."""
    temperature = rows.temperature.clamp_min(1e-5)[:, None]
    scaled = values_RC / temperature
    rank = torch.arange(values_RC.shape[1], device=values_RC.device)
    top_k = torch.where(rows.top_k > 0, rows.top_k, values_RC.shape[1])
    scaled = scaled.masked_fill(rank >= top_k[:, None], NEVER)
    probs = torch.softmax(scaled, -1)
    before = probs.cumsum(-1) - probs
    keep = (before < rows.top_p[:, None]) & (probs >= rows.min_p[:, None] * probs[:, :1])
    keep[:, 0] = True
    noisy = (scaled + noise_at(noise, ids_RC)).masked_fill(~keep, NEVER)
    return ids_RC.gather(1, noisy.argmax(-1, keepdim=True))[:, 0]


def noise_at(noise: tuple[torch.Tensor, ...], ids_RC: torch.Tensor) -> torch.Tensor:
    """Gumbel noise of each row at its own ids. noise: (seed int64, choice, output index), each [R]."""
    seed, choice, out_index = noise
    return ops.gumbel_noise(seed, choice, out_index, ids_RC)


class LogitEdits:
    """Penalties, bias and min_tokens on one rank's vocabulary shard. Counts are made when a row first needs them.

    prompt[s, v]: id v stands in slot s's prompt. output[s, v]: how often slot s produced it.
    """

    def __init__(self, num_slots: int, first_id: int, num_local: int, device: torch.device) -> None:
        self._shape = (num_slots + 1, num_local)
        self._first_id = first_id
        self._device = device
        self._prompt: torch.Tensor | None = None
        self._output: torch.Tensor | None = None

    def admit(self, slot: int, history: list[int], num_prompt: int) -> None:
        """Set a slot's counts from all its tokens so far."""
        if self._prompt is None or self._output is None:
            self._prompt = torch.zeros(self._shape, dtype=torch.bool, device=self._device)
            self._output = torch.zeros(self._shape, dtype=torch.int32, device=self._device)
        self._prompt[slot] = False
        self._output[slot] = 0
        ids = torch.tensor(history, dtype=torch.int64, device=self._device) - self._first_id
        here = (ids >= 0) & (ids < self._shape[1])
        prompt, output = ids[:num_prompt][here[:num_prompt]], ids[num_prompt:][here[num_prompt:]]
        self._prompt[slot, prompt] = True
        self._output[slot].index_add_(0, output, torch.ones_like(output, dtype=torch.int32))

    def count(self, slots: torch.Tensor, tokens: torch.Tensor) -> None:
        """One more output token of each slot (int64 [R], distinct)."""
        if self._output is None:
            return
        local = tokens.long() - self._first_id
        here = ((local >= 0) & (local < self._shape[1])).to(torch.int32)
        where = local.clamp(0, self._shape[1] - 1)
        self._output[slots, where] = self._output[slots, where] + here

    def apply(
        self,
        logits_RV: torch.Tensor,
        slots: torch.Tensor,
        rows: RowTensors,
        out_index: torch.Tensor,
        params: Sequence[RowParams],
    ) -> torch.Tensor:
        """A copy of the logits (fp32) with every row's edits."""
        logits = logits_RV.float().clone()
        if self._prompt is not None and self._output is not None and any(p.needs_history for p in params):
            output = self._output[slots]
            seen = self._prompt[slots] | (output > 0)
            r = rows.repetition_penalty[:, None]
            logits = torch.where(seen, torch.where(logits > 0, logits / r, logits * r), logits)
            logits -= rows.frequency_penalty[:, None] * output + rows.presence_penalty[:, None] * (output > 0)
        self._add_bias(logits, params)
        self._forbid_end(logits, rows, out_index, params)
        return logits

    def _add_bias(self, logits: torch.Tensor, params: Sequence[RowParams]) -> None:
        biased = [
            (i, token - self._first_id, bias)
            for i, p in enumerate(params)
            for token, bias in p.logit_bias
            if 0 <= token - self._first_id < self._shape[1]
        ]
        if biased:
            row, column, bias = (torch.tensor(c, device=self._device) for c in zip(*biased, strict=True))
            logits[row, column] += bias.to(logits.dtype)

    def _forbid_end(
        self, logits: torch.Tensor, rows: RowTensors, out_index: torch.Tensor, params: Sequence[RowParams]
    ) -> None:
        """Whether a row is still below min_tokens is decided on the device: the host does not know its index."""
        ends = [
            (i, token - self._first_id)
            for i, p in enumerate(params)
            for token in (p.end_ids if p.min_tokens else ())
            if 0 <= token - self._first_id < self._shape[1]
        ]
        if ends:
            row, column = (torch.tensor(c, device=self._device) for c in zip(*ends, strict=True))
            early = out_index[row] < rows.min_tokens[row]
            logits[row, column] = torch.where(early, NEVER, logits[row, column])
