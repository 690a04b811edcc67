"""The Python API: `LLM(model).generate(prompts)`. The same engine as the server, in this process."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from rich.progress import Progress

from tpqwen.config import EMBEDDED_MODEL, Config
from tpqwen.errors import EngineError, RequestError
from tpqwen.offline import OfflineEngine
from tpqwen.request import Delta, FinishReason, GenerateRequest, SamplingParams, TokenLogprob
from tpqwen.text.chat import ChatFormat, GenerationDefaults, SamplingDefaults
from tpqwen.text.pipeline import OutputText
from tpqwen.text.sequences import expand
from tpqwen.text.thinking import State
from tpqwen.text.tokenizer import Tokenizer

Prompt = str | list[int]
SHOW_PROGRESS_FROM = 8


@dataclass(frozen=True)
class Usage:
    """Token counts of one answer. cached_tokens of the prompt were found in the prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass
class RequestOutput:
    """One answer. token_ids include the end token; text does not. reasoning is the thinking block of a chat."""

    prompt_token_ids: list[int]
    text: str = ""
    reasoning: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob] | None = None  # of prompt tokens 1, 2, ...; with the first of n answers
    finish_reason: FinishReason | None = None
    cached_tokens: int = 0

    @property
    def usage(self) -> Usage:
        return Usage(len(self.prompt_token_ids), len(self.token_ids), self.cached_tokens)


@dataclass(frozen=True)
class Piece:
    """Text that one step of a stream added."""

    text: str
    reasoning: str = ""


@dataclass
class _Open:
    """A sequence on its way."""

    request: GenerateRequest
    text: OutputText
    output: RequestOutput

    def take(self, delta: Delta) -> Piece:
        """Add a delta; the output's finish_reason is set when text or engine ended it. Raises EngineError."""
        if delta.finish_reason is FinishReason.ERROR:
            raise EngineError(delta.error or "the engine failed", code=delta.error_code or "internal")
        added = self.text.feed(delta)
        out = self.output
        out.text += added.content
        out.reasoning += added.reasoning
        out.token_ids += added.token_ids
        if delta.logprobs is not None:
            scores = [s for s in delta.logprobs[: len(added.token_ids)] if s is not None]
            out.logprobs = (out.logprobs or []) + scores
        out.prompt_logprobs = out.prompt_logprobs or delta.prompt_logprobs
        out.cached_tokens = delta.cached_tokens if delta.cached_tokens is not None else out.cached_tokens
        out.finish_reason = added.finish_reason
        return Piece(added.content, added.reasoning)


class LLM:
    """A loaded model. Use it as a context manager, or call close() to free the device.

    model: a folder in Hugging Face format or a Hub id; the embedded demonstration model by default. tp: ranks (1, 2, 4,
    8); above 1 they run as Ray actors. Further keywords are the options of tpqwen.config. Raises ConfigError.
    One call at a time: whoever drives the engine takes all that it produces. docs/python.md has the whole surface.
    """

    def __init__(self, model: str = EMBEDDED_MODEL, *, tp: int = 1, **options: Any) -> None:
        self.config = Config.load({"model": model, "tp": tp, **options})
        self._engine = OfflineEngine(self.config)
        self._is_driven = False
        self.tokenizer = Tokenizer(self._engine.folder)
        self._chat = ChatFormat(self.tokenizer, GenerationDefaults(**self._engine.model_config.generation_defaults))

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the ranks and free their memory. Idempotent."""
        self._engine.close()

    def sampling_params(self, *, thinking: bool | None = None, **given: Any) -> SamplingParams:
        """The checkpoint's own sampling defaults with the given fields over them. thinking None: plain completion."""
        d: SamplingDefaults = self._chat.defaults(thinking)
        values: dict[str, Any] = {f: getattr(d, f) for f in SamplingDefaults.__dataclass_fields__}
        return SamplingParams(**(values | given))

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | None = None,
        *,
        progress: bool | None = None,
    ) -> list[RequestOutput]:
        """Complete one or many prompts (text or token ids). Answers come in the prompts' order, params.n for each.

        progress: show a bar; by default for SHOW_PROGRESS_FROM prompts or more. Raises RequestError, EngineError.
        """
        many = _as_list(prompts)
        chosen = params or self.sampling_params()
        sequences = [s for p in many for s in self._open(self._ids(p), chosen, None)]
        show = len(many) >= SHOW_PROGRESS_FROM if progress is None else progress
        with Progress(disable=not show, transient=True) as bar:
            task = bar.add_task("generating", total=len(sequences))
            for opened, _ in self._run(sequences):
                bar.update(task, advance=int(opened.output.finish_reason is not None))
        return [s.output for s in sequences]

    def chat(
        self,
        messages: list[dict[str, Any]],
        params: SamplingParams | None = None,
        *,
        thinking: bool | None = None,
    ) -> RequestOutput:
        """Answer a conversation (OpenAI's message shape). thinking None: the model's own way."""
        opened = self._open_chat(messages, params, thinking)
        for _ in self._run([opened]):
            pass
        return opened.output

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Piece]:
        """The completion piece by piece. Closing the iterator ends the request."""
        yield from self._pieces(self._open(self._ids(prompt), params or self.sampling_params(), None)[0])

    def stream_chat(
        self,
        messages: list[dict[str, Any]],
        params: SamplingParams | None = None,
        *,
        thinking: bool | None = None,
    ) -> Iterator[Piece]:
        """The answer to a conversation piece by piece."""
        yield from self._pieces(self._open_chat(messages, params, thinking))

    def _ids(self, prompt: Prompt) -> list[int]:
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt

    def _open_chat(self, messages: list[dict[str, Any]], params: SamplingParams | None, thinking: bool | None) -> _Open:
        prompt = self._chat.prompt(messages, thinking)
        chosen = params or self.sampling_params(thinking=prompt.thinking)
        return self._open(prompt.ids, chosen, prompt.start)[0]

    def _open(self, ids: list[int], params: SamplingParams, start: State | None) -> list[_Open]:
        requests = expand(secrets.token_hex(8), ids, params, self._engine.limits)
        vocabulary = self.tokenizer.vocabulary
        return [_Open(r, OutputText(vocabulary, params, start), RequestOutput(ids)) for r in requests]

    def _pieces(self, opened: _Open) -> Iterator[Piece]:
        for _, piece in self._run([opened]):
            if piece.text or piece.reasoning:
                yield piece

    def _run(self, sequences: list[_Open]) -> Iterator[tuple[_Open, Piece]]:
        """Drive the engine until every sequence has ended; one that a stop string ended is aborted."""
        if self._is_driven:
            text = "this LLM is still answering: take one call at a time, and read a stream to its end or close() it"
            raise RequestError(text, code="one_at_a_time")
        self._is_driven = True
        by_id = {s.request.id: s for s in sequences}
        steps = self._engine.run(s.request for s in sequences)
        try:
            for deltas in steps:
                for d in deltas:
                    opened = by_id.get(d.id)
                    if opened is None or opened.output.finish_reason is not None:
                        continue
                    piece = opened.take(d)
                    if opened.output.finish_reason is not None and d.finish_reason is None:
                        self._engine.core.abort(d.id)
                    yield opened, piece
        finally:
            steps.close()  # type: ignore[attr-defined]  # a generator: what is left is aborted
            self._is_driven = False


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt (text or token ids) or many, as many."""
    if isinstance(prompts, str):
        return [prompts]
    ids = [p for p in prompts if isinstance(p, int)]
    if ids:
        return [ids]
    return [p for p in prompts if not isinstance(p, int)]
