"""The sequences of one HTTP request while the engine runs them: merged into one stream, timed, told to the hooks.

However the consumer leaves (end, error, deadline, client gone), every engine iterator is closed, which aborts it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing

from tpqwen.api.answers import Usage
from tpqwen.api.calls import Prepared
from tpqwen.api.failures import raise_if_failed
from tpqwen.api.hooks import FinishedSequence, RequestHooks
from tpqwen.engine.protocol import Engine
from tpqwen.errors import EngineError, RequestError
from tpqwen.request import Delta, FinishReason, GenerateRequest, TokenLogprob
from tpqwen.text.pipeline import OutputText, TextDelta

Output = tuple[int, TextDelta]
_QUEUE_SIZE = 256


class RunningSequence:
    """One choice: its text, its times, its one end."""

    def __init__(self, request: GenerateRequest, text: OutputText, hooks: RequestHooks, arrived: float) -> None:
        self.request = request
        self.text = text
        self.cached_tokens = 0
        self.first_token_at: float | None = None
        self.last_token_at = arrived
        self.queue_s: float | None = None
        self.resumed = 0
        self.prompt_scores: list[TokenLogprob] | None = None
        self.begun = asyncio.Event()  # the first delta has come, and prompt_scores with it
        self._hooks = hooks
        self._arrived = arrived
        self._accepted = False
        self._ended = False

    def take(self, delta: Delta) -> TextDelta:
        """The delta as text. Raises EngineError when it reports a failure or tokens are lost or doubled."""
        self._accept()
        self.resumed = max(self.resumed, delta.resumed)
        if delta.cached_tokens is not None:
            self.cached_tokens = delta.cached_tokens
        if delta.queue_s is not None:
            self.queue_s = delta.queue_s
        raise_if_failed(delta)
        if delta.token_ids:
            if delta.index != self.text.num_tokens:
                raise EngineError(f"token {delta.index} came where token {self.text.num_tokens} was due")
            self._observe_tokens(len(delta.token_ids))
        out = self.text.feed(delta)
        if not self.begun.is_set():
            self.prompt_scores = delta.prompt_logprobs
            self.begun.set()
        if out.finish_reason is not None:
            self.end(out.finish_reason)
        return out

    def refused(self) -> None:
        """The engine did not take it: no accepted, no finished."""
        self._ended = True

    def end(self, reason: FinishReason) -> None:
        """Tell the hooks, once."""
        if self._ended:
            return
        self._accept()
        self._ended = True
        first = self.first_token_at
        waited = None if first is None else first - self._arrived
        self._hooks.on_finished(
            FinishedSequence(
                reason=str(reason),
                prompt_tokens=len(self.request.prompt_ids),
                output_tokens=self.text.num_tokens,
                cached_tokens=self.cached_tokens,
                total_s=time.monotonic() - self._arrived,
                queue_s=None if waited is None else self.queue_s or 0.0,
                prefill_s=None if waited is None else max(waited - (self.queue_s or 0.0), 0.0),
                decode_s=None if first is None else self.last_token_at - first,
                resumed=self.resumed,
            )
        )

    def _accept(self) -> None:
        if not self._accepted:
            self._accepted = True
            self._hooks.on_accepted(len(self.request.prompt_ids))

    def _observe_tokens(self, count: int) -> None:
        now = time.monotonic()
        if self.first_token_at is None:
            self.first_token_at = now
            self._hooks.on_first_token(now - self._arrived)
        else:
            self._hooks.on_tokens(now - self.last_token_at, count)
        self.last_token_at = now


class Running:
    """All sequences of one HTTP request."""

    def __init__(
        self, engine: Engine, prepared: Prepared, texts: Sequence[OutputText], hooks: RequestHooks, arrived: float
    ) -> None:
        self.sequences = [
            RunningSequence(request, text, hooks, arrived)
            for request, text in zip(prepared.sequences, texts, strict=True)
        ]
        self._engine = engine
        self._prepared = prepared
        self._arrived = arrived
        self._prepared_at = time.monotonic()

    def outputs(self) -> AsyncGenerator[Output]:
        """(choice index, delta) as they come, until every choice has ended. Close it in any case.

        Raises what the engine raises; the other choices are aborted then.
        """
        if len(self.sequences) == 1:
            return self._outputs_of(0)
        return self._merged()

    @property
    def usage(self) -> Usage:
        """Counts so far."""
        n, completion, cached, reasoning = self._prepared.params.n, 0, 0, 0
        for index, sequence in enumerate(self.sequences):
            completion += sequence.text.num_tokens
            reasoning += sequence.text.num_reasoning_tokens
            if index % n == 0:  # a prompt is looked up once, for its first choice
                cached += sequence.cached_tokens
        return Usage(self._prepared.num_prompt_tokens, completion, cached, reasoning)

    @property
    def timing(self) -> str:
        """Value of the server-timing header, milliseconds: what is known by now, of the first choice."""
        first = self.sequences[0]
        if first.first_token_at is None:
            return ""
        queue_s = first.queue_s or 0.0
        parts = {
            "queue": queue_s,
            "prefill": max(first.first_token_at - self._arrived - queue_s, 0.0),
            "decode": first.last_token_at - first.first_token_at,
        }
        return ", ".join(f"{name};dur={seconds * 1e3:.1f}" for name, seconds in parts.items())

    @property
    def stages(self) -> dict[str, str]:
        """For the log, milliseconds of the first choice: until it went to the engine, in its queue, until its first
        token was here. What lies between is its steps and the way back."""
        first = self.sequences[0]
        ends = {"prepared_ms": self._prepared_at - self._arrived}
        if first.first_token_at is not None:
            ends |= {"queue_ms": first.queue_s or 0.0, "first_ms": first.first_token_at - self._arrived}
        return {name: f"{seconds * 1e3:.1f}" for name, seconds in ends.items()}

    async def _outputs_of(self, index: int) -> AsyncGenerator[Output]:
        sequence = self.sequences[index]
        deltas = self._engine.generate(sequence.request)
        reason = FinishReason.ABORT
        try:
            async for delta in deltas:
                first = not sequence.begun.is_set()
                out = sequence.take(delta)
                if first:
                    await self._share_scores(index, out)
                if out.finish_reason is not None:
                    # Before the last text goes out: a stop string's request must not run on while a client is slow.
                    await _close(deltas)
                    yield index, out
                    return
                yield index, out
            reason = FinishReason.ERROR
            raise EngineError(f"request {sequence.request.id} ended without its last delta")
        except RequestError:
            sequence.refused()
            raise
        except EngineError:
            reason = FinishReason.ERROR
            raise
        finally:
            sequence.end(reason)
            await _close(deltas)

    async def _share_scores(self, index: int, out: TextDelta) -> None:
        """The prompt is scored once, for its first choice; the others get the scores with their first text."""
        params = self._prepared.params
        leader = self.sequences[index - index % params.n]
        if params.prompt_logprobs is not None and leader is not self.sequences[index]:
            await leader.begun.wait()
            out.prompt_scores = leader.prompt_scores

    async def _merged(self) -> AsyncGenerator[Output]:
        queue: asyncio.Queue[Output | BaseException] = asyncio.Queue(_QUEUE_SIZE)
        tasks = [asyncio.create_task(self._pump(i, queue)) for i in range(len(self.sequences))]
        open_choices = len(tasks)
        try:
            while open_choices:
                item = await queue.get()
                if isinstance(item, BaseException):
                    raise item
                open_choices -= item[1].finish_reason is not None
                yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _pump(self, index: int, queue: asyncio.Queue[Output | BaseException]) -> None:
        try:
            async with aclosing(self._outputs_of(index)) as outputs:
                async for output in outputs:
                    await queue.put(output)
        except Exception as error:
            await queue.put(error)


async def _close(deltas: AsyncIterator[Delta]) -> None:
    """Closing the iterator is what aborts the request in the engine; harmless after its end."""
    close = getattr(deltas, "aclose", None)
    if close is not None:
        await close()
