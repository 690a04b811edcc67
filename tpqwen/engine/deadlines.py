"""How long a step may take before its ranks count as hung.

A dead process shows by itself and a stopped one by its missing receipt; the deadline is for what has taken the step and
does not come back: a collective without its partner, a kernel that spins.
"""

from __future__ import annotations

from tpqwen.step import RowParams, StepInput, row_bucket, token_bucket

FLOOR_S = 4.0  # a hang is to be known within 5 s, and a busy machine may hold a healthy step up for a second or two
DECODE_MARGIN = 8.0
PREFILL_MARGIN = 8.0  # attention over a long context makes later chunks slower than the measured ones
SLOW_PREFILL_S_PER_TOKEN = 0.02  # until a rate has been measured: a large model on a few CPU cores
SLOW_GPU_S_PER_TOKEN = 0.002  # the same on GPUs
LONGEST_S = 200.0  # at most: an engine that waits for more than recovery.SILENCE_S counts as lost itself
FIRST_STEP_S = 20.0  # of an epoch, at least: first touch of memory
FIRST_COMPILED_STEP_S = 180.0  # the same where kernels are compiled and graphs captured when first used
NEW_SHAPE_S = 60.0  # a shape or kind of sampling not seen before, for the same reason; or a guide to be made ready


class Deadlines:
    """Learns from the steps that ended. compiles: kernels and graphs are made when a shape is first used (GPUs)."""

    def __init__(self, *, compiles: bool = False) -> None:
        self._compiles = compiles
        self._first = 0  # number of the epoch's first step that is not idle
        self._compiling: set[int] = set()  # numbers of steps in flight that may compile kernels
        self._s_per_token: float | None = None
        self._decode_s = 0.0  # moving average
        self._rows = 0  # that decode, as of the last step asked about
        self._shapes: set[tuple[int, int, int, int, bool, int]] = set()  # that have been seen with these kinds
        self._kinds: set[tuple[bool, ...]] = set()

    def of(self, step: StepInput) -> float:
        """Seconds from the moment the step is the oldest in flight. Ask once for each step, in order."""
        compiling = self._note_shape(step) and self._compiles
        if compiling:
            self._compiling.add(step.step)
        slow = SLOW_GPU_S_PER_TOKEN if self._compiles else SLOW_PREFILL_S_PER_TOKEN
        rate = slow if self._s_per_token is None else PREFILL_MARGIN * self._s_per_token
        needed = max(FLOOR_S, DECODE_MARGIN * self._decode_s) + rate * step.num_chunk_tokens
        if step.step == self._first:
            needed = max(needed, FIRST_COMPILED_STEP_S if self._compiles else FIRST_STEP_S)
        guided = any(admit.params.guided for admit in step.admits)
        return min(LONGEST_S, max(needed, NEW_SHAPE_S) if guided or compiling else needed)

    def of_idle(self, step: StepInput) -> float:
        """The same for an idle step, in which ranks compile and capture. It is nobody's measure and no first step."""
        self._first += step.step == self._first
        return NEW_SHAPE_S if step.step else FIRST_COMPILED_STEP_S

    def observe(self, step: StepInput, duration_s: float, *, captured: bool = False) -> None:
        """Learn from a step that has ended. No measure is the first of an epoch, and what captured a graph or may have
        compiled kernels."""
        compiled = bool(self._compiling)  # ranks launch a step before they answer the one before it
        self._compiling.discard(step.step)
        if captured or compiled or step.step <= self._first:
            return
        if tokens := step.num_chunk_tokens:
            seen = duration_s / tokens
            self._s_per_token = seen if self._s_per_token is None else 0.9 * self._s_per_token + 0.1 * seen
        else:
            self._decode_s = 0.9 * self._decode_s + 0.1 * duration_s

    def restart(self) -> None:
        """The ranks are new: what they compiled is gone, how fast they are is not."""
        self._shapes.clear()
        self._compiling.clear()
        self._first = 0

    def _note_shape(self, step: StepInput) -> bool:
        if step.decode is not None:
            self._rows = len(step.decode) // 4
        kinds = {_kind(admit.params) for admit in step.admits} - self._kinds
        if kinds:
            self._kinds |= kinds
            self._shapes.clear()
        tokens = step.num_chunk_tokens
        size = token_bucket(tokens, len(step.chunks)) if tokens else 0
        chunks = (len(step.chunks).bit_length(), size, tokens.bit_length())
        shape = (row_bucket(self._rows), *chunks, step.wide, step.speculate)
        if shape in self._shapes:
            return False
        self._shapes.add(shape)
        return True


def _kind(p: RowParams) -> tuple[bool, ...]:
    """What decides which kernels a row needs."""
    cuts = (p.top_k > 0, p.top_p < 1.0 or p.min_p > 0.0)
    return (p.temperature > 0, *cuts, p.needs_history, bool(p.logit_bias), p.min_tokens > 0, p.logprobs >= 0)
