"""The prompt tokens that a step may take on beside running streams."""

from __future__ import annotations

import pytest

from tests.fakes import FakeExecutor, tiny_capacity
from tpqwen.engine.core import EngineCore
from tpqwen.engine.pace import LEAST, STALL, Pace
from tpqwen.request import GenerateRequest, SamplingParams
from tpqwen.step import StepInput, StepStats


def stats(phase: str, duration_s: float, prompt_tokens: int = 0) -> StepStats:
    return StepStats(duration_s, phase, 0, 0, 0, 0, 0, 0, 0, 0, 0, prompt_tokens, 0)


def test_nothing_is_limited_before_both_costs_are_known() -> None:
    pace = Pace()
    pace.observe(stats("decode", 0.01))
    assert pace.limit is None
    pace.observe(stats("mixed", 0.05, LEAST - 1))  # too few tokens to measure by
    assert pace.limit is None


def test_the_limit_is_what_some_decode_steps_of_time_can_compute() -> None:
    pace = Pace()
    pace.observe(stats("decode", 0.01))
    pace.observe(stats("prefill", 0.1, 10_000))
    assert pace.limit == pytest.approx(STALL * 0.01 / 1e-5, abs=1)
    for _ in range(100):  # prompt tokens have become ten times as expensive; the decode rows' own part does not count
        pace.observe(stats("mixed", 0.11, 1000))
    assert pace.limit == pytest.approx(LEAST, abs=1)


def test_the_core_measures_and_passes_the_limit_on() -> None:
    """Steps take 1 ms and 1 us per prompt token of fake time."""
    now, taken = 0.0, []

    class Timed(FakeExecutor):
        def submit(self, step: StepInput) -> None:
            nonlocal now
            taken.append(step.num_chunk_tokens)
            now += 1e-3 + step.num_chunk_tokens * 1e-6
            super().submit(step)

    executor = Timed(tiny_capacity(num_blocks=2000, max_batched_tokens=2048, max_model_len=4096), depth=1)
    core = EngineCore(executor, executor.start(), clock=lambda: now)

    def add(name: str, prompt: list[int]) -> None:
        core.add(GenerateRequest(id=name, prompt_ids=prompt, params=SamplingParams(), max_tokens=500, seed=1))

    add("first", list(range(600)))
    add("second", list(range(700, 705)))
    for _ in range(10):
        core.step()
    add("long", list(range(1, 3001)))
    while core.has_work:
        core.step()
    chunks = [t for t in taken[1:] if t]
    assert taken[0] == 605
    assert sum(chunks) == 3000
    assert max(chunks) < 2048 / 2, "both streams go on while the long prompt is computed in pieces"
