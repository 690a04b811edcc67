"""One forward pass of one rank: slots in, sampled tokens out, all on the device.

B decode rows, T tokens, R sampled rows, P block size. Nothing here reads a device value on the host, so a decode pass
can be captured as a CUDA graph and the next pass can be launched before this one has run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tpqwen.kernels import attention_table, ops
from tpqwen.kernels.context import DecodeInputs, DraftInputs, PrefillRows, SlotTensors, StepContext
from tpqwen.model.qwen3 import Qwen3
from tpqwen.step import RowParams
from tpqwen.worker.batch import ChunkBatch
from tpqwen.worker.kv_cache import KVCache
from tpqwen.worker.prompt import Pooled, PromptScores, pool, score_prompts
from tpqwen.worker.sampler import LogitEdits, LogprobTensors, SampleKind, Sampler
from tpqwen.worker.slots import SlotState


@dataclass(frozen=True)
class Sampled:
    """What a pass leaves on the device. tokens are in the slots' ring as well, where the host reads them."""

    tokens: torch.Tensor  # int32 [R], -1 where the logits were bad
    logprobs: LogprobTensors | None = None
    prompt_scores: tuple[PromptScores, ...] = ()
    pooled: Pooled | None = None

    def to_host(self) -> Sampled:
        """The same with all numbers but the tokens on the host, once the device has come so far."""
        return Sampled(
            self.tokens,
            self.logprobs.to_host() if self.logprobs is not None else None,
            tuple(s.to_host() for s in self.prompt_scores),
            self.pooled.to_host() if self.pooled is not None else None,
        )


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

    def has_wide(self, num_rows: int) -> bool:
        """Whether a pass over so many decode rows runs differently with StepContext.wide."""
        heads, kv_heads, head_dim = self.model.heads
        return not self.model.invariant and attention_table.has_wide(num_rows, kv_heads, heads // kv_heads, head_dim)

    def blank_hidden(self, num_tokens: int) -> torch.Tensor:
        """A residual stream of zeros, [T, H]; layers change it in place."""
        weight = self.model.norm.weight
        return torch.zeros(num_tokens, len(weight), dtype=weight.dtype, device=weight.device)

    def decode_logits(self, slots_B: torch.Tensor, *, wide: bool = False) -> torch.Tensor:
        """One token of each slot (int32) through the model; the slots' lengths advance. Returns local logits [B, V]."""
        hidden: torch.Tensor = self.model(*self.decode_context(slots_B, wide=wide))
        return self.model.logits(hidden)

    def decode(self, slots_B: torch.Tensor, kind: SampleKind, *, wide: bool = False) -> Sampled:
        """A whole decode step without host decisions (kind.in_graph)."""
        return self.finish(self.model(*self.decode_context(slots_B, wide=wide)), slots_B, kind)

    def finish(
        self, hidden_BH: torch.Tensor, slots_B: torch.Tensor, kind: SampleKind, state: SlotTensors | None = None
    ) -> Sampled:
        """Its end: tokens from the residual stream. state: where the slots are, if not the rank's own."""
        state = self.state.tensors if state is None else state
        if kind.needs_logits:
            return Sampled(self.sampler.sample(self.model.logits(hidden_BH), slots_B, kind, state))
        return Sampled(self.sampler.settle(*self.model.slices(hidden_BH, state, slots_B), slots_B, state))

    def speculate(self, slots_B: torch.Tensor, kind: SampleKind, count: int) -> None:
        """A whole speculative step (kind.in_graph): each row's last token and `count` drafted ones run as a chunk of a
        prompt would, all are sampled, and the slots advance by what was right. The tokens are in the ring."""
        state = self.state.tensors
        drafted = ops.begin_drafts(state, slots_B, self.cache.block_size, count)
        hidden = self.model(drafted.ids, self._drafts_context(drafted, slots_B, count))
        sampled = self.finish(hidden, drafted.slots, kind, drafted.rows)
        ops.accept_drafts(state, slots_B, drafted.ids, sampled.tokens)

    def mixed(
        self,
        rows_B: torch.Tensor,
        chunks: ChunkBatch,
        kind: SampleKind,
        params: tuple[RowParams, ...],
        *,
        wide: bool = False,
    ) -> Sampled | None:
        """Decode rows (slots int32, possibly none) and prefill chunks in one pass; the chunks that sample come after
        the decode rows. None when nothing samples and no prompt is scored."""
        hidden = self.model(*self.mixed_context(rows_B, chunks, wide=wide))
        state = self.state.tensors
        state.length[chunks.slots_C] = chunks.rows.lengths_C
        if state.history.shape[1]:
            state.history[chunks.token_slots, chunks.positions.long()] = chunks.ids
        count = len(rows_B)
        where = torch.cat([torch.arange(count, device=hidden.device), chunks.sampled + count])
        scores = score_prompts(self.model, self.sampler, hidden[count:], chunks)
        if not len(where):
            return Sampled(where.int(), prompt_scores=scores) if scores else None
        slots, hidden = torch.cat([rows_B, chunks.sampled_slots]), hidden[where]
        logits = self.model.logits(hidden)
        pooled = pool(self.model, self.sampler, hidden, logits, params)
        return replace(self.sample(logits, slots, kind, params), prompt_scores=scores, pooled=pooled)

    def sample(
        self, logits_RV: torch.Tensor, slots_R: torch.Tensor, kind: SampleKind, params: tuple[RowParams, ...]
    ) -> Sampled:
        """Tokens of the slots (int32), which become their last ones. params (host copies) are needed for kind.edits."""
        edited = logits_RV
        if kind.edits:
            out_index = self.state.tensors.out_index[slots_R]
            edited = self.edits.apply(logits_RV, slots_R, self.state.gather(slots_R), out_index, params)
        tokens = self.sampler.sample(edited, slots_R, kind)
        wanted = max((p.logprobs for p in params), default=-1)
        logprobs = self.sampler.logprobs(logits_RV, tokens, wanted) if kind.logprobs else None
        self.edits.count(slots_R, tokens)
        return Sampled(tokens, logprobs)

    def decode_context(self, slots_B: torch.Tensor, *, wide: bool = False) -> tuple[torch.Tensor, StepContext]:
        """Begin a decode step: what the model is given, ids and context. The slots' lengths advance."""
        decode = ops.begin_step(self.state.tensors, slots_B, self.cache.block_size)
        # The embedding's look-up is a plain launch after begin_step: from there on the inputs are settled.
        where = (decode.positions_B, decode.cache_slots_B)
        return decode.ids_B, self._context(*where, decode, slots_B, settled=True, wide=wide)

    def mixed_context(
        self, rows_B: torch.Tensor, chunks: ChunkBatch, *, wide: bool = False
    ) -> tuple[torch.Tensor, StepContext]:
        """The same for a pass over decode rows and chunks."""
        decode = ops.begin_step(self.state.tensors, rows_B, self.cache.block_size)
        positions = torch.cat([decode.positions_B, chunks.positions])
        cache_slots = torch.cat([decode.cache_slots_B, chunks.cache_slots])
        context = self._context(positions, cache_slots, decode, rows_B, chunks=chunks.rows, wide=wide)
        return torch.cat([decode.ids_B, chunks.ids]), context

    def _drafts_context(self, drafted: DraftInputs, slots_B: torch.Tensor, count: int) -> StepContext:
        """As many chunks as rows, of count + 1 tokens each."""
        rows, width = len(slots_B), count + 1
        # A graph holds for every length, and no chunk is a whole prompt; a CPU reads the lengths, which it may.
        context = (width + 1,) * rows if slots_B.is_cuda else tuple(drafted.lengths_B.tolist())
        chunks = PrefillRows(
            tables_CM=self.state.tensors.tables_SM[slots_B.long()],
            query_start=torch.arange(0, (rows + 1) * width, width, dtype=torch.int32, device=slots_B.device),
            lengths_C=drafted.lengths_B,
            num_query=(width,) * rows,
            num_context=context,
        )
        none = DecodeInputs(*(x[:0] for x in drafted[:4]))
        return self._context(drafted.positions, drafted.cache_slots, none, slots_B[:0], chunks=chunks, wide=False)

    def _context(
        self,
        positions_T: torch.Tensor,
        cache_slots_T: torch.Tensor,
        decode: DecodeInputs,
        slots_B: torch.Tensor,
        *,
        chunks: PrefillRows | None = None,
        settled: bool = False,
        wide: bool,
    ) -> StepContext:
        return StepContext(
            positions_T=positions_T,
            cache_slots_T=cache_slots_T,
            num_decode=len(slots_B),
            tables_SM=self.state.tensors.tables_SM,
            decode_slots_B=slots_B,
            decode_lengths_B=decode.lengths_B,
            prefill=chunks,
            k_cache=self.cache.k,
            v_cache=self.cache.v,
            cos_sin=self.cos_sin,
            settled=settled,
            wide=wide,
        )
