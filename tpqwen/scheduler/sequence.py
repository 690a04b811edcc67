"""Sequence: the one mutable record of a request. Only the scheduler writes it; ranks hold no copy."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from enum import Enum, auto

from tpqwen.errors import RequestError
from tpqwen.request import Delta, FinishReason, GenerateRequest, TokenLogprob
from tpqwen.scheduler.thinking import ThinkingWatch
from tpqwen.step import Admit, RowParams

ALONE_AFTER = 2  # crashes; from then on a sequence runs in no other's company
CRASH_BUDGET = 3  # with the third crash it ends


class State(Enum):
    """waiting: holds no slot and no blocks. running: holds both. finished: for good."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(eq=False, slots=True)
class Sequence:
    """Prompt and output tokens in one array, and what the sequence holds while it runs.

    While running, with known = all tokens at admission (num_prefill of them):
    [0, num_registered blocks) findable in the prefix cache | [.., settled) computed by collected steps |
    [settled, Rows.computed) computed by steps in flight | the rest not yet scheduled.
    """

    request: GenerateRequest
    order: tuple[int, int, int]  # (priority, tag of its share, arrival): lower goes first, kept over preemptions
    arrived_at: float
    max_output: int  # tokens: max_tokens or what the context leaves; 1 that is dropped where the prompt is all
    row_params: RowParams
    tokens: array[int] = field(init=False)  # array("i"): its bytes are the wire's int32 on every machine we run on
    state: State = State.WAITING
    slot: int = -1
    blocks: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)  # of its full blocks, as far as they were needed
    num_prefill: int = 0  # tokens known at admission: what its chunks have to reach
    num_chunked: int = 0  # of those, computed by collected steps
    num_registered: int = 0  # leading blocks offered to the prefix cache
    preemptions: int = 0
    resumed: int = 0  # crashes in which it was running
    cached_tokens: int = 0  # prompt tokens found in the prefix cache at first admission
    queue_s: float | None = None  # None until first scheduled
    announced: bool = False  # the first delta has gone out
    waits_for: bytes | None = None  # digest of a block that an older sequence is computing
    prompt_scores: list[TokenLogprob] = field(default_factory=list)  # of tokens 1, 2, ... as far as they have come in
    watch: ThinkingWatch | None = None  # of its reasoning, where there is a budget

    def __post_init__(self) -> None:
        self.tokens = array("i", self.request.prompt_ids)
        self.tokens.extend(self.request.output_ids)
        self.resumed = self.request.crashes
        if self.request.thinking is not None:
            self.watch = ThinkingWatch(self.request.thinking, self.request.output_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - len(self.request.prompt_ids)

    @property
    def runs_alone(self) -> bool:
        """Whether it may be what crashes the ranks, so that nobody else must be in its batch."""
        return self.resumed >= ALONE_AFTER

    @property
    def wants_scores(self) -> bool:
        """Whether log-probabilities of prompt tokens are still to come: then no position may be skipped."""
        return self.row_params.prompt_logprobs >= 0 and len(self.prompt_scores) < self.num_prompt - 1

    def targets(self, start: int, end: int) -> bytes:
        """Prompt tokens that follow positions start .. end-1, as int32 bytes; empty unless they are wanted."""
        return self.tokens[start + 1 : min(end + 1, self.num_prompt)].tobytes() if self.wants_scores else b""

    @property
    def settled(self) -> int:
        """Positions whose KV was written by collected steps. A sampled token proves all before it computed."""
        return self.num_chunked if self.num_chunked < self.num_prefill else len(self.tokens) - 1

    def describe(self, delta: Delta) -> None:
        """Add what only the first delta after an admission carries."""
        delta.resumed = self.resumed
        if not self.request.max_tokens:
            delta.token_ids = []
        if not self.announced:
            self.announced = True
            delta.cached_tokens = self.cached_tokens
            delta.queue_s = self.queue_s
            delta.prompt_logprobs = self.prompt_scores or None

    def ended_before(self) -> Delta | None:
        """The terminal delta of a resubmitted request whose output was already complete."""
        request, index = self.request, self.num_output - 1
        if index >= request.min_tokens and index >= 0 and self.tokens[-1] in request.end_ids:
            delta = self.finish(FinishReason.STOP)
            delta.stop_id = self.tokens[-1]
            return delta
        return self.finish(FinishReason.LENGTH) if self.num_output >= self.max_output else None

    def close_thinking(self) -> tuple[int, ...]:
        """Append the closing tokens, as many as there is room for; returns them."""
        assert self.watch is not None
        closing = self.watch.closing[: self.max_output - self.num_output]
        self.tokens.extend(closing)
        for token in closing:
            self.watch.take(token)
        return closing

    @property
    def crash_text(self) -> str:
        """Why it is not tried again."""
        return f"this request was running in {self.resumed} crashes of the engine or its ranks and is not tried again"

    def over_budget(self) -> Delta | None:
        """The terminal delta of a resubmitted request that has been in too many crashes."""
        if self.resumed < CRASH_BUDGET:
            return None
        return self.finish(FinishReason.ERROR, error=self.crash_text, code="crash_budget")

    def finish(self, reason: FinishReason, *, error: str | None = None, code: str | None = None) -> Delta:
        """The terminal delta of a sequence that ends without a token."""
        self.state = State.FINISHED
        return Delta(
            id=self.request.id,
            index=self.num_output,
            token_ids=[],
            finish_reason=reason,
            error=error,
            error_code=code,
            resumed=self.resumed,
        )


def arriving(request: GenerateRequest, order: tuple[int, int, int], now: float, limit: int) -> Sequence:
    """A new sequence. limit: tokens that the context holds; whoever calls has checked that the prompt fits."""
    room = limit - len(request.prompt_ids)
    return Sequence(
        request=request,
        order=order,
        arrived_at=now,
        max_output=min(request.max_tokens, room) if request.max_tokens else 1,
        row_params=row_params(request),
    )


def check_fits(request: GenerateRequest, limit: int) -> None:
    """Raise RequestError unless prompt and one output token fit into `limit` tokens."""
    length = len(request.prompt_ids)
    if not length:
        raise RequestError("the prompt has no tokens", param="prompt", code="invalid_value")
    if length + min(request.max_tokens, 1) > limit:
        text = f"the prompt has {length} tokens, but the context holds {limit} and one is needed for the answer"
        raise RequestError(text, param="prompt", code="context_length_exceeded")


def admission(sequence: Sequence, num_cached: int = 0) -> Admit:
    """What the ranks are told when it takes its slot. num_cached: how many of its first tokens they must be told."""
    params, guide = sequence.row_params, sequence.request.guide
    history = sequence.tokens.tobytes() if params.needs_history else b""
    output = sequence.tokens[sequence.num_prompt :].tobytes() if guide is not None else b""
    cached = sequence.tokens[:num_cached].tobytes()
    return Admit(sequence.slot, params, sequence.num_output, sequence.num_prompt, history, guide, output, cached)


def by_order(sequence: Sequence) -> tuple[int, int, int]:
    """Sort key of every queue."""
    return sequence.order


def row_params(request: GenerateRequest) -> RowParams:
    """What the ranks need of the parameters."""
    p = request.params
    return RowParams(
        temperature=0.0 if p.greedy else p.temperature,
        top_k=p.top_k,
        top_p=p.top_p,
        min_p=p.min_p,
        seed=request.seed % 2**64,
        choice=request.choice,
        presence_penalty=p.presence_penalty,
        frequency_penalty=p.frequency_penalty,
        repetition_penalty=p.repetition_penalty,
        logit_bias=tuple(sorted(p.logit_bias.items())),
        min_tokens=request.min_tokens,
        end_ids=request.end_ids if request.min_tokens else (),
        logprobs=-1 if p.logprobs is None else p.logprobs,
        prompt_logprobs=-1 if p.prompt_logprobs is None or request.choice else p.prompt_logprobs,
        pooling=request.pooling,
        guided=request.guide is not None,
    )
