"""What a request is, free of any API's spelling: parameters in, deltas out."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum

import msgspec


class FinishReason(StrEnum):
    """Why a request ended. Every accepted request gets exactly one."""

    STOP = "stop"  # an end token, a stop token id or a stop string
    LENGTH = "length"  # max_tokens or the context is full
    TOOL_CALLS = "tool_calls"  # as STOP, in an answer that calls tools; said by the text layer only
    ABORT = "abort"  # the caller left
    ERROR = "error"


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How tokens are chosen, one meaning for every surface (Python, HTTP, ranks).

    temperature 0 is greedy. top_k 0 and top_p 1 and min_p 0 are off; the order is top-k, then top-p over what
    top-k left, then min-p, as in transformers. presence and frequency count output tokens, repetition counts
    prompt and output. logprobs: None is off, n asks for the chosen token and the n likeliest (0..20); prompt_logprobs
    is the same for the tokens of the prompt (its first has none), told once however many choices there are.
    seed None is replaced by a recorded random one when the request is admitted.
    stop holds strings (matched on text, above the engine), stop_token_ids ids (matched in the engine).
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    @property
    def greedy(self) -> bool:
        """Below 1e-5 the noise could not change the choice any more, and logits / T would overflow."""
        return self.temperature < 1e-5


class Pooling(msgspec.Struct, frozen=True, array_like=True):
    """Asks for numbers about the prompt instead of output tokens, taken at its last token.

    Without ids: the final hidden state, after the last norm. With ids: the log-probabilities that they come next.
    """

    ids: tuple[int, ...] = ()


class ThinkingBudget(msgspec.Struct, frozen=True, array_like=True):
    """After so many tokens of reasoning the closing tokens (a sentence, the mark, an empty line) take its place.

    inside: the prompt ends in an open thinking block; otherwise the first output token may open one.
    """

    tokens: int
    inside: bool
    open_id: int
    close_id: int
    closing: tuple[int, ...]


class Guide(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """What the output must look like, by grammars that are compiled already; b"" binds nothing.

    answer: the content. call: the text between the call marks. calls: -1 none are looked for, 0 they may come, 1 the
    output must consist of calls (after the reasoning). inside: the prompt ends in an open thinking block; may_think:
    the output may open one. end_ids end the output once it is complete. forbidden_ids (end_ids among them) may not come
    below min_tokens as long as anything else may. blank_ids are an empty line: one may stand after the reasoning.
    newline_id may stand between two calls; parallel: whether there may be two. -1 is an id that the model lacks.
    """

    answer: bytes = b""
    call: bytes = b""
    calls: int = -1
    parallel: bool = True
    inside: bool = False
    may_think: bool = False
    end_ids: tuple[int, ...] = ()
    forbidden_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    think_open: int = -1
    think_close: int = -1
    call_open: int = -1
    call_close: int = -1
    blank_ids: tuple[int, ...] = ()
    newline_id: int = -1


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence to generate: token ids only, defaults resolved, one choice (n is expanded above).

    max_tokens and seed are always set here. end_ids are the model's end tokens (empty with ignore_eos) joined with
    stop_token_ids. priority: lower runs first. cache_salt separates prefix caches. tenant: whose it is, for the fair
    share of the queue. output_ids: tokens already produced, when a request is resubmitted to a new engine; they count
    against max_tokens and are not sent again.
    max_tokens 0 computes the prompt alone: one terminal delta without tokens (`pooled`, `prompt_logprobs`).
    thinking: a limit of its reasoning, guide: the form of its output, where there is one.
    crashes: how often it was running when ranks or an engine died before.
    """

    id: str
    prompt_ids: list[int]
    params: SamplingParams
    max_tokens: int
    seed: int
    choice: int = 0
    end_ids: tuple[int, ...] = ()
    priority: int = 0
    cache_salt: str = ""
    tenant: str = ""
    output_ids: list[int] = []
    pooling: Pooling | None = None  # only with max_tokens 0
    crashes: int = 0
    thinking: ThinkingBudget | None = None
    guide: Guide | None = None

    @property
    def min_tokens(self) -> int:
        """Before so many tokens no end token counts. A guide sees to it itself: it knows when nothing else may come."""
        return 0 if self.guide is not None else self.params.min_tokens


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities at one output position, natural log, before temperature and truncation, after no penalty."""

    logprob: float
    top_ids: list[int]
    top_logprobs: list[float]


class Delta(msgspec.Struct, kw_only=True):
    """What one step produced for one request. Terminal exactly when finish_reason is set.

    index is the output index of token_ids[0], so that a receiver can assert that none is lost or doubled.
    """

    id: str
    index: int
    token_ids: list[int]
    logprobs: list[TokenLogprob | None] | None = None  # None for a token that was not sampled (ThinkingBudget.closing)
    finish_reason: FinishReason | None = None
    stop_id: int | None = None  # the token that ended it, when a token did
    error: str | None = None
    error_code: str | None = None
    cached_tokens: int | None = None  # prompt tokens found in the prefix cache; set on the first delta only
    queue_s: float | None = None  # time until first scheduled; set on the first delta only
    prompt_logprobs: list[TokenLogprob] | None = None  # of prompt tokens 1, 2, ...; set on the first delta only
    pooled: bytes | None = None  # float32, what `pooling` asked for
    resumed: int = 0  # how often the request was recomputed after a fault


class Deltas(msgspec.Struct, frozen=True, array_like=True):
    """What one step produced for all requests. Most get one token and nothing else: those are arrays, the first three.

    A request that is in both got its single token before the other delta. Iterating makes a Delta of each.
    """

    ids: list[str] = []
    indexes: bytes = b""  # int32, the output index of each one's token
    tokens: bytes = b""  # int32
    others: list[Delta] = []

    def __iter__(self) -> Iterator[Delta]:
        indexes, tokens = memoryview(self.indexes).cast("i"), memoryview(self.tokens).cast("i")
        for name, index, token in zip(self.ids, indexes, tokens, strict=True):
            yield Delta(id=name, index=index, token_ids=[token])
        yield from self.others

    def __len__(self) -> int:
        return len(self.ids) + len(self.others)
