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
from tpqwen.kernels.context import SlotTensors
from tpqwen.kernels.reference import GREEDY_BELOW, MAX_CANDIDATES
from tpqwen.parallel.group import TPGroup
from tpqwen.request import TokenLogprob
from tpqwen.step import RowParams
from tpqwen.worker.batch import to_device, to_host
from tpqwen.worker.guides import GuideRows
from tpqwen.worker.slots import RowTensors

NEVER = float("-inf")


@dataclass(frozen=True)
class SampleKind:
    """Which work a set of rows needs; part of a graph's identity. Rows of one kind may ride in a larger one."""

    candidates: bool = False  # some row has 0 < top_k <= MAX_CANDIDATES
    full: bool = False  # some row truncates without a small top_k: whole rows are gathered
    edits: bool = False  # penalties, bias, min_tokens or a guide change some row's logits
    logprobs: bool = False

    def __or__(self, other: SampleKind) -> SampleKind:
        """What rows of both kinds need together."""
        return SampleKind(
            self.candidates or other.candidates,
            self.full or other.full,
            self.edits or other.edits,
            self.logprobs or other.logprobs,
        )

    @property
    def needs_logits(self) -> bool:
        """Whether logits must lie in memory; else the LM head itself finds the token."""
        return self != SampleKind()

    @property
    def in_graph(self) -> bool:
        """The rest takes host decisions and runs after the graph."""
        return not (self.full or self.edits or self.logprobs)


USUAL_KINDS = (SampleKind(candidates=True), SampleKind())  # Qwen3's own top_k, and by temperature alone or greedy


def kind_of(rows: Sequence[RowParams]) -> SampleKind:
    """The least kind that serves all rows."""
    sampled = [p for p in rows if p.temperature >= GREEDY_BELOW]
    return SampleKind(
        candidates=any(_small(p) for p in sampled),
        full=any(_truncates(p) and not _small(p) for p in sampled),
        edits=any(p.needs_history or p.logit_bias or p.min_tokens or p.guided for p in rows),
        logprobs=any(p.logprobs >= 0 for p in rows),
    )


def _small(p: RowParams) -> bool:
    return 0 < p.top_k <= MAX_CANDIDATES


def _truncates(p: RowParams) -> bool:
    return p.top_k > 0 or p.top_p < 1.0 or p.min_p > 0.0


@dataclass(frozen=True)
class LogprobTensors:
    """chosen [R], top [R, n] with ids [R, n], best first."""

    chosen: torch.Tensor
    top: torch.Tensor
    top_ids: torch.Tensor

    def to_host(self) -> LogprobTensors:
        """As worker/batch.py: to_host."""
        return LogprobTensors(to_host(self.chosen), to_host(self.top), to_host(self.top_ids))

    def rows(self, counts: list[int]) -> list[tuple[int, TokenLogprob]]:
        """For the rows that asked (counts[r] >= 0); on the host."""
        chosen, top, ids = self.chosen.tolist(), self.top.tolist(), self.top_ids.tolist()
        return [(r, TokenLogprob(chosen[r], ids[r][:n], top[r][:n])) for r, n in enumerate(counts) if n >= 0]


class Sampler:
    """Sampling of one rank. first_id: global id of the shard's first row. invariant: as in kernels/ops.py."""

    def __init__(self, group: TPGroup, state: SlotTensors, first_id: int, *, invariant: bool = False) -> None:
        self._group = group
        self._state = state
        self._first_id = first_id
        self._invariant = invariant

    def sample(
        self, logits_RV: torch.Tensor, slots_R: torch.Tensor, kind: SampleKind, state: SlotTensors | None = None
    ) -> torch.Tensor:
        """logits fp32 or bf16 with padding ids at -inf -> token ids int32 [R], settled in the slots, the rank's own or
        those of `state`. -1: a bad row, with NaN or +inf, or with nothing allowed in it."""
        state = self._state if state is None else state
        slices = ops.noisy_slices(logits_RV, state, slots_R, self._first_id, invariant=self._invariant)
        value, token = self._best(*slices)
        if kind.full:
            value, token = (x[:, None] for x in ops.best_slice(value, token))
            values, ids = self.full_logits(logits_RV).sort(dim=-1, descending=True, stable=True)
            slots = slots_R.long()
            top_k, top_p, min_p = state.top_k[slots], state.top_p[slots], state.min_p[slots]
            whole = (top_k > MAX_CANDIDATES) | ((top_k == 0) & ((top_p < 1.0) | (min_p > 0.0)))
            whole &= state.temperature[slots] >= GREEDY_BELOW
            chosen = ops.choose(values, ids, state, slots_R, invariant=self._invariant)
            token = torch.where(whole[:, None], chosen[:, None], token)
        candidates = self._candidates(logits_RV) if kind.candidates else None
        return ops.finish_step(state, slots_R, value, token, candidates)

    def settle(
        self, value_RS: torch.Tensor, id_RS: torch.Tensor, slots_R: torch.Tensor, state: SlotTensors | None = None
    ) -> torch.Tensor:
        """`sample` of a kind without needs, from this rank's slices."""
        state = self._state if state is None else state
        return ops.finish_step(state, slots_R, *self._best(value_RS, id_RS), None)

    def _best(self, value_RS: torch.Tensor, id_RS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Slices of this rank, or each rank's best [R, G]; one gather of 2R numbers."""
        if self._group.size == 1:
            return value_RS, id_RS
        value_R, id_R = ops.best_slice(value_RS, id_RS)
        pair = torch.stack([value_R.to(torch.float64), id_R.to(torch.float64)])
        values, ids = self._group.all_gather(pair).permute(1, 2, 0)  # [R, G] each
        return values.float().contiguous(), ids.long().contiguous()

    def _candidates(self, logits_RV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Each row's best MAX_CANDIDATES values and global ids, best first."""
        values, ids = ops.top_candidates(logits_RV, min(MAX_CANDIDATES, logits_RV.shape[-1]))
        values, ids = values.float(), ids + self._first_id
        if self._group.size > 1:
            values, ids = (x[:, :MAX_CANDIDATES].contiguous() for x in self._merged(values, ids))
        return values, ids

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
        lse = ops.log_sum_exp(logits, invariant=self._invariant)
        values, ids = ops.top_candidates(logits, min(max(wanted, 1), logits.shape[1]), invariant=self._invariant)
        ids = ids + self._first_id
        if self._group.size > 1:
            lse = ops.log_sum_exp(self._group.all_gather(lse).t(), invariant=self._invariant)
            chosen = self._group.all_gather(chosen).amax(0)
            values, ids = self._merged(values, ids)
        return LogprobTensors(chosen - lse, values - lse[:, None], ids)

    def _merged(self, values_RC: torch.Tensor, ids_RC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """All ranks' candidates [R, G * C], best first; equal values keep rank order, so the lowest id leads."""
        values = self._group.all_gather(values_RC).transpose(0, 1).flatten(1)
        ids = self._group.all_gather(ids_RC).transpose(0, 1).flatten(1)
        values, order = values.sort(dim=-1, descending=True, stable=True)
        return values, ids.gather(1, order)


class LogitEdits:
    """Penalties, bias, min_tokens and guides on one rank's vocabulary shard. Counts are made when a row needs them.

    prompt[s, v]: id v stands in slot s's prompt. output[s, v]: how often slot s produced it.
    """

    def __init__(self, num_slots: int, first_id: int, num_local: int, device: torch.device) -> None:
        self._shape = (num_slots + 1, num_local)
        self._first_id = first_id
        self._device = device
        self._prompt: torch.Tensor | None = None
        self._output: torch.Tensor | None = None
        self.guides: GuideRows | None = None

    def admit(self, slot: int, history: torch.Tensor, num_prompt: int) -> None:
        """Set a slot's counts from all its tokens so far (int32, on the device)."""
        if self._prompt is None or self._output is None:
            self._prompt = torch.zeros(self._shape, dtype=torch.bool, device=self._device)
            self._output = torch.zeros(self._shape, dtype=torch.int32, device=self._device)
        where, here = self._local(history)
        self._prompt[slot] = self._output[slot].zero_().index_add_(0, where[:num_prompt], here[:num_prompt]) > 0
        self._output[slot].zero_().index_add_(0, where[num_prompt:], here[num_prompt:])

    def count(self, slots: torch.Tensor, tokens: torch.Tensor) -> None:
        """One more output token of each slot (int64 [R], distinct)."""
        if self._output is None:
            return
        where, here = self._local(tokens)
        self._output[slots, where] = self._output[slots, where] + here

    def _local(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Where tokens stand in this shard, and how often (int32): 1, or 0 if not at all. A mask would take fewer of
        them, and the host would have to wait for how many."""
        local = tokens.long() - self._first_id
        here = (local >= 0) & (local < self._shape[1])
        return local.clamp(0, self._shape[1] - 1), here.to(torch.int32)

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
        return self.guides.apply(logits) if self.guides is not None else logits

    def _add_bias(self, logits: torch.Tensor, params: Sequence[RowParams]) -> None:
        biased = [
            (i, token - self._first_id, bias)
            for i, p in enumerate(params)
            for token, bias in p.logit_bias
            if 0 <= token - self._first_id < self._shape[1]
        ]
        if biased:
            row, column, bias = zip(*biased, strict=True)
            where = to_device([row, column], torch.int64, self._device).unbind()
            logits[where] += to_device(bias, logits.dtype, self._device)

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
            row, column = to_device(list(zip(*ends, strict=True)), torch.int64, self._device).unbind()
            early = out_index[row] < rows.min_tokens[row]
            logits[row, column] = torch.where(early, NEVER, logits[row, column])
