"""State machine over scheduler, blocks and fake ranks: arrivals, aborts, steps, NaN, and crashes at any point.

After every rule the books balance; at the end every request has ended exactly once, with exactly the tokens it had to
have, or those it had when it was aborted, spoiled or in one crash too many. Steps that were in flight in a crash may
answer late, and nobody listens.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import msgspec
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.control.test_scheduler_random import Run
from tests.fakes import expected_tokens, tiny_capacity
from tpqwen.request import FinishReason, GenerateRequest, SamplingParams
from tpqwen.step import RowParams, StepOutput

EXAMPLES = int(os.environ.get("TPQWEN_MACHINE_EXAMPLES", "60"))


class FaultyRun(Run):
    """Knows which requests a NaN has ended."""

    def __init__(self, depth: int, **sizes: int) -> None:
        super().__init__(tiny_capacity(**sizes), depth=depth)
        self.spoil_next = False
        self.executor.is_bad = self._is_bad
        self.late: list[StepOutput] = []

    def _is_bad(self, history: Sequence[int], params: RowParams) -> bool:
        del history, params
        bad, self.spoil_next = self.spoil_next, False
        return bad

    def crash(self, answered: bool) -> None:
        """The ranks are lost; answered: results of steps in flight may still come, later."""
        if answered:
            while self.executor.outputs:
                self.late.append(self.executor.collect(1.0))
        self.restart()

    def hear_late(self) -> None:
        assert not self.scheduler.update(self.late.pop(0))

    def check_ended(self) -> None:
        """Every request ended once; whatever it was sent is a prefix of what it had to get."""
        assert self.ended.keys() == self.requests.keys()
        assert self.scheduler.pool.num_used == 0 and self.scheduler.num_waiting == 0
        for name, request in self.requests.items():
            room = self.scheduler.context_limit - len(request.prompt_ids)
            original = msgspec.structs.replace(request, output_ids=[])
            expected = expected_tokens(original, min(request.max_tokens, room))
            tokens, end = self.tokens[name], self.ended[name]
            assert tokens == expected[: len(tokens)]
            if end.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
                assert tokens == expected
            else:
                assert end.finish_reason is FinishReason.ABORT or end.error_code in ("numerical_error", "crash_budget")


class Engine(RuleBasedStateMachine):
    """Rules are what may happen to an engine; the order is hypothesis's."""

    @initialize(
        depth=st.integers(1, 3),
        blocks=st.integers(4, 40),
        slots=st.integers(1, 6),
        budget=st.integers(1, 24),
    )
    def begin(self, depth: int, blocks: int, slots: int, budget: int) -> None:
        self.run = FaultyRun(depth, num_blocks=blocks, max_num_seqs=slots, max_batched_tokens=budget)

    @rule(data=st.data(), tokens=st.integers(1, 24), priority=st.integers(0, 1), salt=st.sampled_from(["", "x"]))
    def arrive(self, data: st.DataObject, tokens: int, priority: int, salt: str) -> None:
        limit = self.run.scheduler.context_limit
        prompt = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=min(limit - 1, 24)))
        produced = data.draw(st.sampled_from([0, 0, 2]))
        request = GenerateRequest(
            id=f"r{len(self.run.requests)}",
            prompt_ids=prompt,
            params=SamplingParams(presence_penalty=0.5 if salt else 0.0),
            max_tokens=tokens,
            seed=len(self.run.requests),
            end_ids=(7, 8),
            priority=priority,
            cache_salt=salt,
        )
        if 0 < produced < min(tokens, limit - len(prompt)):  # resubmitted by the replica after the engine's death
            output = expected_tokens(request, produced)
            request = msgspec.structs.replace(request, output_ids=output)
        self.run.add(request)

    @precondition(lambda self: self.run.requests)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        self.run.abort(data.draw(st.sampled_from(sorted(self.run.requests))))

    @rule(times=st.integers(1, 6))
    def steps(self, times: int) -> None:
        for _ in range(times):
            if not self.run.schedule() and self.run.scheduler.num_in_flight:
                self.run.collect()

    @precondition(lambda self: self.run.scheduler.num_in_flight)
    @rule()
    def collect(self) -> None:
        self.run.collect()

    @rule()
    def spoil(self) -> None:
        self.run.spoil_next = True

    @rule(answered=st.booleans())
    def crash(self, answered: bool) -> None:
        self.run.crash(answered)

    @precondition(lambda self: self.run.late)
    @rule()
    def hear_late(self) -> None:
        self.run.hear_late()

    @invariant()
    def books_balance(self) -> None:
        if hasattr(self, "run"):
            self.run.scheduler.check()

    def teardown(self) -> None:
        if hasattr(self, "run"):
            self.run.finish()
            self.run.check_ended()


TestEngine = Engine.TestCase
TestEngine.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=60,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
