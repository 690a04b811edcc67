"""What the HTTP layer tells metrics, as a protocol: `tpqwen.metrics.ServerMetrics` implements it.

Calls come from the event loop's thread, must not block and must not raise. "Sequence" is one GenerateRequest: a request
with n choices or several prompts is several sequences. All times are seconds of a monotonic clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

REJECT_REASONS = ("queue_full", "rate_limit", "too_long", "draining", "invalid", "unavailable")


@dataclass(frozen=True)
class FinishedSequence:
    """The life of one accepted sequence, told once when it ends.

    reason: a value of request.FinishReason: stop, length, abort, error. queue_s + prefill_s is the time to the first
    token; decode_s runs from the first token to the last one. A time that did not come to pass is None (a request
    aborted before its first token has neither queue_s nor prefill_s nor decode_s).
    """

    reason: str
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int  # prompt tokens found in the prefix cache
    total_s: float  # from arrival of the HTTP request to the end
    queue_s: float | None = None  # waiting to be scheduled
    prefill_s: float | None = None  # scheduled until the first token
    decode_s: float | None = None
    resumed: int = 0  # how often it was recomputed after a fault


class RequestHooks(Protocol):
    """Observer of requests. on_accepted is followed by exactly one on_finished; a refused one has on_rejected only."""

    def on_accepted(self, prompt_tokens: int) -> None:
        """The engine took a sequence: called just before its first token, or before its end when it has none."""

    def on_first_token(self, ttft_s: float) -> None:
        """First token of a sequence, counted from the arrival of its HTTP request."""

    def on_tokens(self, gap_s: float, num_tokens: int) -> None:
        """A later delta of num_tokens >= 1 tokens came gap_s after the sequence's previous one."""

    def on_finished(self, sequence: FinishedSequence) -> None:
        """The sequence ended, in whatever way."""

    def on_rejected(self, reason: str) -> None:
        """An HTTP request was refused; reason is one of REJECT_REASONS. Once per HTTP request."""

    def on_http(self, route: str, method: str, code: int, seconds: float) -> None:
        """An HTTP exchange is over. route is the template (/v1/models/{id}), or "other"; code 499: the client left."""

    def metrics_text(self) -> str:
        """This process's metrics in Prometheus text format 0.0.4."""
