"""One forward pass of one rank: slots in, sampled tokens out, all on the device.

B decode rows, T tokens, R sampled rows, P block size. Nothing here reads a device value on the host, so a decode pass
can be captured as a CUDA graph and the next pass can be launched before this one has run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tpqwen.kernels.context import StepContext
from tpqwen.model.qwen3 import Qwen3
from tpqwen.step import RowParams
from tpqwen.worker.batch import ChunkBatch
from tpqwen.worker.kv_cache import KVCache
from tpqwen.worker.sampler import LogitEdits, LogprobTensors, SampleKind, Sampler
from tpqwen.worker.slots import RowTensors, SlotState


@dataclass(frozen=True)
class DecodeRows:
    """The rows that decode, gathered when they change. Padding rows point at the padding slot."""

    slots: torch.Tensor  # int64 [B]
    tables_BM: torch.Tensor  # int32
    params: RowTensors

    def take(self, count: int) -> DecodeRows:
        """The first `count` rows, as views."""
        return DecodeRows(self.slots[:count], self.tables_BM[:count], self.params.take(count))


@dataclass(frozen=True)
class Sampled:
    """What a pass leaves on the device."""

    tokens: torch.Tensor  # int32 [R]
    bad: torch.Tensor  # bool [R]
    logprobs: LogprobTensors | None = None


class Runner:
    """Model, cache, slots and sampler of one rank."""

    def __init__(
        self, model: Qwen3, cache: KVCache, state: SlotState, sampler: Sampler, edits: LogitEdits, cos_sin: torch.Tensor
    ) -> None:
        self.model = model
        self.cache = cache
        self.state = state
        self.sampler = sampler
        self.edits = edits
        self.cos_sin = cos_sin

    def decode_logits(self, rows: DecodeRows) -> torch.Tensor:
        """One token of each row through the model; the slots' lengths advance. Returns local logits [B, V]."""
        ids, context = self._decode_inputs(rows)
        hidden = self.model(ids, context)
        self.state.length[rows.slots] = context.decode_lengths_B
        return self.model.logits(hidden)

    def decode(self, rows: DecodeRows, kind: SampleKind) -> Sampled:
        """A whole decode step without host decisions (kind.in_graph)."""
        return self.sample(self.decode_logits(rows), rows.slots, rows.params, kind, ())

    def mixed(
        self, rows: DecodeRows | None, chunks: ChunkBatch, kind: SampleKind, params: tuple[RowParams, ...]
    ) -> Sampled | None:
        """Decode rows and prefill chunks in one pass; the chunks that sample come after the decode rows. None when
        nothing samples."""
        ids, context = self._mixed_inputs(rows, chunks)
        hidden = self.model(ids, context)
        state, num_decode = self.state, context.num_decode
        state.length[chunks.slots_C] = chunks.rows.lengths_C
        if rows is not None:
            state.length[rows.slots] = context.decode_lengths_B
        where, slots = chunks.sampled + num_decode, chunks.sampled_slots
        if rows is not None:
            where = torch.cat([torch.arange(num_decode, device=where.device), where])
            slots = torch.cat([rows.slots, slots])
        if not slots.shape[0]:
            return None
        logits = self.model.logits(hidden[where])
        return self.sample(logits, slots, state.gather(slots), kind, params)

    def sample(
        self,
        logits_RV: torch.Tensor,
        slots: torch.Tensor,
        rows: RowTensors,
        kind: SampleKind,
        params: tuple[RowParams, ...],
    ) -> Sampled:
        """Tokens of the rows; they become the slots' last tokens. params (host copies) are needed for kind.edits."""
        state = self.state
        out_index = state.out_index[slots]
        edited = self.edits.apply(logits_RV, slots, rows, out_index, params) if kind.edits else logits_RV
        tokens, bad = self.sampler.sample(edited, rows, out_index, kind)
        wanted = max((p.logprobs for p in params), default=-1)
        logprobs = self.sampler.logprobs(logits_RV, tokens, wanted) if kind.logprobs else None
        self.edits.count(slots, tokens)
        state.last_token[slots] = tokens
        state.out_index[slots] = out_index + 1
        return Sampled(tokens, bad, logprobs)

    def _decode_inputs(self, rows: DecodeRows) -> tuple[torch.Tensor, StepContext]:
        size = self.cache.block_size
        positions = self.state.length[rows.slots]
        active = rows.slots != self.state.padding_slot
        blocks = rows.tables_BM.gather(1, (positions // size).long()[:, None])[:, 0]
        cache_slots = torch.where(active, blocks * size + positions % size, -1).long()
        lengths = torch.where(active, positions + 1, 0).to(torch.int32)
        context = self._context(positions, cache_slots, rows.tables_BM, lengths)
        return self.state.last_token[rows.slots], context

    def _mixed_inputs(self, rows: DecodeRows | None, chunks: ChunkBatch) -> tuple[torch.Tensor, StepContext]:
        if rows is None:
            none = chunks.ids.new_empty(0)
            return chunks.ids, self._context(
                chunks.positions, chunks.cache_slots, none.view(0, 1), none, prefill=chunks
            )
        ids, decode = self._decode_inputs(rows)
        context = self._context(
            torch.cat([decode.positions_T, chunks.positions]),
            torch.cat([decode.cache_slots_T, chunks.cache_slots]),
            decode.decode_tables_BM,
            decode.decode_lengths_B,
            prefill=chunks,
        )
        return torch.cat([ids, chunks.ids]), context

    def _context(
        self,
        positions: torch.Tensor,
        cache_slots: torch.Tensor,
        tables: torch.Tensor,
        lengths: torch.Tensor,
        *,
        prefill: ChunkBatch | None = None,
    ) -> StepContext:
        return StepContext(
            positions_T=positions,
            cache_slots_T=cache_slots,
            num_decode=lengths.shape[0],
            decode_tables_BM=tables,
            decode_lengths_B=lengths,
            prefill=prefill.rows if prefill is not None else None,
            k_cache=self.cache.k,
            v_cache=self.cache.v,
            cos_sin=self.cos_sin,
        )
