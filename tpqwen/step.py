"""The wire between scheduler and ranks: StepInput, StepOutput, Capacity. The only file both columns import.

A rank keeps per-slot state on its device (last token, length, block table, parameters) and advances it itself, so a
StepInput carries only what the device cannot know. In steady decode that is a few dozen bytes.
Arrays travel as little-endian int32 bytes; `ints` and `packed` convert. Encoding is msgpack, never pickle.
"""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray

from tpqwen.request import Guide, Pooling, TokenLogprob

Ints = NDArray[np.int32]
TOKEN_BUCKETS = (64, 128, 256, 512, 768, 1024, 1536, 2048)  # prompt tokens of the passes that ranks have as graphs
FEW_CHUNKS, MANY_CHUNKS = 8, 32  # of a smaller one of them and of a larger one
LONG_ROW = 4096  # tokens of context beyond which a row that decodes counts as long
DRAFT_ROWS = 16  # rows of a speculative step at most: the weights dominate a pass of up to 128 tokens
FEW_CANDIDATES = 64  # the largest top_k that ranks answer from a row's best candidates alone
GIVEN_UP = -1  # as StepOutput.graphs_left: there is no memory for more graphs


def packed(values: object) -> bytes:
    """Integers (any nesting numpy takes) as int32 bytes, row-major."""
    return np.asarray(values, dtype="<i4").tobytes()


def ints(data: bytes, *shape: int) -> Ints:
    """The inverse of `packed`; read-only view, no copy. Without a shape: one dimension."""
    array = np.frombuffer(data, dtype="<i4")
    return array.reshape(shape) if shape else array


def row_bucket(rows: int) -> int:
    """The size that so many decode rows run as: 1, 2, 4, 8, then every 8 up to 64, every 16 up to 256, every 64 beyond.

    Ranks have a CUDA graph for each; max_num_seqs takes the place of those from it on.
    """
    if rows <= 8:
        return 1 << (rows - 1).bit_length() if rows else 0
    step = 8 if rows <= 64 else 16 if rows <= 256 else 64
    return -(-rows // step) * step


def token_bucket(tokens: int, chunks: int = 1) -> int:
    """The size that so many prompt tokens in so many chunks run as, where that is a graph; 0 where it is none."""
    return next((size for size in TOKEN_BUCKETS if size >= tokens and chunk_places(size) >= chunks), 0)


def chunk_places(size: int) -> int:
    """Chunks that a graph of so many prompt tokens has room for. Each costs a row of logits, even where none is."""
    return FEW_CHUNKS if size <= 512 else MANY_CHUNKS


class RowParams(msgspec.Struct, frozen=True, array_like=True):
    """Sampling parameters of one slot as the ranks use them. temperature 0 is greedy; top_k 0 is off.

    Noise is Philox4x32-10 with key = seed (64 bits) and counter = (output index, token id // 4, choice, 0), lane =
    token id % 4: it depends on nothing else.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int  # 0 <= seed < 2**64
    choice: int
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    end_ids: tuple[int, ...] = ()  # forbidden while the output index is below min_tokens
    logprobs: int = -1  # -1 off, else how many of the likeliest
    prompt_logprobs: int = -1  # the same for the positions of chunks that carry targets
    pooling: Pooling | None = None
    guided: bool = False  # a guide says which tokens are allowed

    @property
    def needs_history(self) -> bool:
        """Whether earlier tokens of the row change its logits."""
        return bool(self.presence_penalty or self.frequency_penalty) or self.repetition_penalty != 1.0

    @property
    def can_speculate(self) -> bool:
        """Whether ranks sample the row without a decision of the host's, so that several of its tokens may be sampled
        in one step: worker/sampler.py says in_graph."""
        edited = self.needs_history or self.logit_bias or self.min_tokens or self.guided or self.logprobs >= 0
        small = 0 < self.top_k <= FEW_CANDIDATES
        cut = self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0
        return not edited and (self.temperature == 0.0 or small or not cut)


class Admit(msgspec.Struct, frozen=True, array_like=True):
    """A sequence takes a slot; whatever the slot held before is forgotten.

    out_index: index of the next output token (above 0 when the sequence was preempted or replayed).
    history: int32 bytes of all its tokens so far and num_prompt of them are prompt; only sent when
    params.needs_history, empty otherwise.
    guide: the form of its output, if it has one; output: int32 bytes of the output so far, for the guide only.
    cached: int32 bytes of its first tokens, those whose KV is in the cache already, so that no chunk brings them; only
    sent where drafts are made of a sequence's own tokens.
    """

    slot: int
    params: RowParams
    out_index: int
    num_prompt: int
    history: bytes = b""
    guide: Guide | None = None
    output: bytes = b""
    cached: bytes = b""


class Chunk(msgspec.Struct, frozen=True, array_like=True):
    """Tokens of one slot to run through the model at positions start .. start+len-1.

    sample: the chunk reaches the sequence's last known token, so its last position is sampled and the result
    becomes the slot's last token; the slot can be in the next step's decode rows without the host knowing the token.
    targets: int32 bytes, the prompt tokens that follow the chunk's first, second, ... position; only sent when their
    log-probabilities are wanted (params.prompt_logprobs).
    """

    slot: int
    start: int
    token_ids: bytes
    sample: bool
    targets: bytes = b""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) // 4


class StepInput(msgspec.Struct, frozen=True, array_like=True):
    """One step. Applied in field order: admits, blocks, then the forward pass over decode rows and chunks.

    decode: int32 bytes, slots that decode one token each, in row order; None means the same as in the last step.
    blocks: int32 bytes [n, 3], rows (slot, index in its block table, block id).
    wide: the context of some decode row, this step's token included, is longer than LONG_ROW: all ranks take the
    variant of the pass that is made for it.
    Row order of the pass and of StepOutput.tokens: the decode rows, then the chunks that sample, in the order given.
    With neither it is an idle step: nothing runs, and each rank captures the next of its CUDA graphs ahead.
    speculate: of a step of decode rows alone, how many tokens each rank drafts for every row and has the pass check: a
    row yields between one token and speculate + 1, and its blocks hold as many positions.
    """

    epoch: int
    step: int
    admits: tuple[Admit, ...]
    blocks: bytes
    chunks: tuple[Chunk, ...]
    decode: bytes | None
    wide: bool = False
    speculate: int = 0

    @property
    def num_chunk_tokens(self) -> int:
        return sum(c.num_tokens for c in self.chunks)

    @property
    def edits_slots(self) -> bool:
        """Whether it says anything but "the same rows once more", chunks apart."""
        return self.decode is not None or bool(self.blocks or self.admits)


class StepOutput(msgspec.Struct, frozen=True, array_like=True):
    """What rank 0 answers. tokens: int32 bytes, one per sampled row in StepInput's row order.

    counts: of a speculative step, int32 bytes, how many tokens each row has; empty: one.
    bad_rows: indexes of rows whose logits held NaN or Inf (their last token is meaningless).
    logprobs: (index into tokens, TokenLogprob) for the rows that asked. busy_s: device time of the step, seconds,
    0.0 where it is not measured. error: the rank's own failure in words; then nothing else is valid.
    prompt_logprobs: (index into StepInput.chunks, one for each of its targets). pooled: (index into tokens, float32
    bytes) for the rows with params.pooling. idle_s: seconds that the device did nothing between the step before and
    this one; None unless both only decode and it is measured. captured: a CUDA graph was captured between the step's
    launch and this answer, so that its duration says nothing about others'. graphs_left: of an idle step, how many are
    left for later ones, or GIVEN_UP.
    """

    epoch: int
    step: int
    tokens: bytes
    bad_rows: tuple[int, ...] = ()
    logprobs: tuple[tuple[int, TokenLogprob], ...] = ()
    busy_s: float = 0.0
    error: str = ""
    prompt_logprobs: tuple[tuple[int, list[TokenLogprob]], ...] = ()
    pooled: tuple[tuple[int, bytes], ...] = ()
    idle_s: float | None = None
    captured: bool = False
    graphs_left: int = 0
    counts: bytes = b""


class Capacity(msgspec.Struct, frozen=True, kw_only=True):
    """What the group of ranks can hold, known after loading. Sizes the scheduler and the block pool."""

    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_model_len: int
    max_batched_tokens: int  # tokens in one step, decode rows included
    graphs_ahead: int = 0  # CUDA graphs that idle steps may capture, one in each
    context_cost: float = 0.0  # how much a token of context adds to the computation of a prompt token
    graph_tokens: int = 0  # prompt tokens of the largest pass that is quickly launched, as a graph; 0: all are alike
    graph_chunks: int = 0  # and the chunks that it may have
    launch_tokens: int = 0  # prompt tokens that are computed in the time that launching kernel by kernel takes
    kv_dtype: str = ""
    load_seconds: dict[str, float] = {}  # stage -> seconds: weights, kernels, warmup, kv_alloc
    versions: dict[str, str] = {}  # of torch, and on GPUs of cuda and nccl


class RankStats(msgspec.Struct, frozen=True, kw_only=True):
    """Slow numbers of one rank, asked for every few seconds and never on a step's path. Bytes and seconds."""

    rank: int
    pid: int
    host: str
    device: str
    busy_s_total: float = 0.0
    memory_allocated_bytes: int = 0
    graphs_pending: int = 0  # CUDA graphs that it would still capture ahead
    gpu: dict[str, float] = {}  # NVML readings, empty where there is none
    gpu_uuid: str = ""
    gpu_name: str = ""
    throttle_reasons: tuple[str, ...] = ()


class StepStats(msgspec.Struct, frozen=True, array_like=True):
    """Scheduler's view after one step; what metrics observe."""

    duration_s: float
    phase: str  # prefill | decode | mixed
    num_tokens: int
    num_running: int
    num_waiting: int
    blocks_used: int
    blocks_cached: int
    blocks_free: int
    preemptions: int
    prefix_queried_tokens: int
    prefix_hit_tokens: int
    prompt_tokens: int  # prompt tokens computed in this step
    output_tokens: int
    busy_s: float = 0.0
    idle_s: float | None = None  # device time between the step before and this one, where both only decode
    host_s: float = 0.0  # what the engine's thread worked for it, without waiting for its result
    num_drafts: int = 0  # rows of a speculative step
    draft_tokens: int = 0  # that were drafted for them
    accepted_tokens: int = 0  # drafted tokens that turned out to be the row's


class SlotView(msgspec.Struct, frozen=True, array_like=True):
    """A taken slot, for people who look on: nothing of whose request it is or what it says."""

    slot: int
    phase: str  # prefill | decode
    num_tokens: int  # prompt and output so far
    num_computed: int  # of those, in the KV cache by steps that have ended


class Snapshot(msgspec.Struct, frozen=True, array_like=True):
    """What the scheduler holds at one moment."""

    num_slots: int
    slots: list[SlotView]  # the taken ones
    blocks_used: int
    blocks_cached: int
    blocks_free: int
    num_waiting: int
    waiting_tokens: int


_step_decoder = msgspec.msgpack.Decoder(StepInput)
_output_decoder = msgspec.msgpack.Decoder(StepOutput)
encode = msgspec.msgpack.Encoder().encode
decode_input = _step_decoder.decode
decode_output = _output_decoder.decode
