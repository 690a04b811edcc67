"""EngineCore: the pipeline, its deadlines, and what happens when the ranks fail."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from tests.fakes import FakeExecutor, expected_tokens, tiny_capacity
from tpqwen.config import ScheduleOptions
from tpqwen.engine.core import EngineCore
from tpqwen.engine.deadlines import Deadlines
from tpqwen.errors import EngineError, Overloaded, RankDied, RequestError
from tpqwen.recovery import SILENCE_S
from tpqwen.request import Delta, FinishReason, GenerateRequest, SamplingParams
from tpqwen.step import Admit, Chunk, RowParams, StepInput, StepOutput, packed


class Clock:
    """Moves on by a tenth of a second at each look."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        self.now += 0.1
        return self.now


def request(i: int, max_tokens: int = 12, prompt: int = 10) -> GenerateRequest:
    ids = [50 * i + j for j in range(prompt)]
    return GenerateRequest(id=str(i), prompt_ids=ids, params=SamplingParams(), max_tokens=max_tokens, seed=i)


def core_over(executor: FakeExecutor, depth: int = 2) -> EngineCore:
    return EngineCore(executor, executor.start(), ScheduleOptions(depth=depth), clock=Clock())


def drive(core: EngineCore, deltas: list[Delta] | None = None, limit: int = 2000) -> list[Delta]:
    deltas = [] if deltas is None else deltas
    while core.has_work:
        deltas += core.step().deltas
        core.scheduler.check()
        limit -= 1
        assert limit
    return deltas


def outputs(deltas: list[Delta]) -> dict[str, list[int]]:
    out: dict[str, list[int]] = {}
    for d in deltas:
        tokens = out.setdefault(d.id, [])
        assert d.index == len(tokens)
        tokens += d.token_ids
    return out


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_outputs_do_not_depend_on_the_depth_and_the_pipeline_is_kept_full(depth: int) -> None:
    executor = FakeExecutor(depth=4)
    core = core_over(executor, depth)
    for i in range(5):
        core.add(request(i))
    most = 0
    deltas: list[Delta] = []
    while core.has_work:
        result = core.step()
        most = max(most, len(executor.outputs) + (result.stats is not None))
        deltas += result.deltas
    assert outputs(deltas) == {str(i): expected_tokens(request(i), 12) for i in range(5)}
    assert most == depth
    assert not executor.outputs


def test_the_executors_depth_bounds_the_cores() -> None:
    executor = FakeExecutor(depth=1)
    core = core_over(executor, 4)
    core.add(request(0))
    assert outputs(drive(core)) == {"0": expected_tokens(request(0), 12)}


def test_nothing_is_submitted_without_work() -> None:
    executor = FakeExecutor()
    core = core_over(executor)
    assert not core.has_work
    assert core.step().stats is None
    assert executor.steps == []


def test_a_ready_result_is_collected_before_the_pipeline_is_full() -> None:
    executor = FakeExecutor(depth=4)
    executor.ready = lambda: bool(executor.outputs)  # type: ignore[method-assign]
    core = core_over(executor, 4)
    core.add(request(0))
    assert core.step().stats is not None


def test_an_abort_ends_the_request_with_the_next_result_and_drains_the_pipeline() -> None:
    executor = FakeExecutor()
    core = core_over(executor)
    core.add(request(0))
    core.step()
    core.abort("0")
    core.abort("0")
    core.abort("unknown")
    deltas = drive(core)
    assert [(d.finish_reason, d.token_ids) for d in deltas] == [(FinishReason.ABORT, [])]
    assert not executor.outputs
    assert core.scheduler.pool.num_used == 0


@pytest.mark.parametrize("collect", [1, 2, 5, 9])
@pytest.mark.parametrize("error", [RankDied("rank 1 was killed", rank=1), EngineError("out of memory")])
def test_after_a_fault_and_a_restart_every_stream_goes_on_exactly(collect: int, error: EngineError) -> None:
    executor = FakeExecutor(faults={collect: error})
    core = core_over(executor)
    for i in range(12):
        core.add(request(i))
    deltas: list[Delta] = []
    with pytest.raises(type(error), match=str(error)):
        drive(core, deltas)
    executor.restart(1)
    core.restart(1, executor.capacity)
    core.add(request(12))
    drive(core, deltas)
    assert outputs(deltas) == {str(i): expected_tokens(request(i), 12) for i in range(13)}
    ends = [d for d in deltas if d.finish_reason]
    assert len(ends) == 13
    assert any(d.resumed == 1 for d in ends)


def test_a_ranks_own_error_is_raised_and_a_late_result_of_old_ranks_is_dropped() -> None:
    executor = FakeExecutor()
    core = core_over(executor)
    core.add(request(0))
    collect = executor.collect
    executor.collect = lambda timeout_s: StepOutput(0, 0, b"", error="CUDA out of memory")  # type: ignore[method-assign]
    with pytest.raises(EngineError, match="CUDA out of memory"):
        drive(core)
    executor.restart(1)
    core.restart(1, executor.capacity)
    late = [StepOutput(0, 1, b"")]
    executor.collect = lambda timeout_s: late.pop() if late else collect(timeout_s)  # type: ignore[method-assign]
    assert outputs(drive(core)) == {"0": expected_tokens(request(0), 12)}
    assert not late


def test_when_the_ranks_are_lost_for_good_every_request_ends_with_the_cause() -> None:
    executor = FakeExecutor(faults={3: RankDied("rank 0 does not answer", rank=0)})
    core = core_over(executor)
    for i in range(3):
        core.add(request(i))
    with pytest.raises(RankDied) as caught:
        drive(core)
    core.fail(caught.value)
    assert core.has_work
    deltas = core.take_deltas()
    assert [(d.finish_reason, d.error_code) for d in deltas] == [(FinishReason.ERROR, "rank_dead")] * 3
    assert not core.has_work


def test_deadlines_first_step_long_then_by_prefill_tokens() -> None:
    executor = FakeExecutor(tiny_capacity(num_blocks=100))
    core = core_over(executor)
    core.add(request(0, prompt=40))
    drive(core)
    first, second, third, *decode = executor.timeouts
    assert first == 20.0
    assert second == pytest.approx(4 + 16 * 0.02)  # nothing measured yet
    assert 4 < third < 8
    assert set(decode) == {4.0}
    executor.restart(1)
    core.restart(1, executor.capacity)
    core.add(request(1))
    drive(core)
    assert executor.timeouts[-12] == 20.0


def step_of(number: int, rows: int = 0, tokens: int = 0, *, wide: bool = False, **params: Any) -> StepInput:
    chunks = (Chunk(0, 0, packed([1] * tokens), True),) if tokens else ()
    values = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0, "choice": 0} | params
    admits = (Admit(0, RowParams(**values), 0, 1),) if params else ()
    return StepInput(0, number, admits, b"", chunks, packed(list(range(rows))) if rows else None, wide)


def test_a_slow_decode_raises_its_own_deadline() -> None:
    deadlines = Deadlines()
    for number in range(1, 100):
        deadlines.observe(step_of(number, 4), 2.0)
    assert deadlines.of(step_of(100, 4)) == pytest.approx(16, rel=0.01)
    deadlines.observe(step_of(101, tokens=100), 1.0)
    assert deadlines.of(step_of(102, tokens=50)) == pytest.approx(16 + 8 * 50 * 0.01, rel=0.01)


def test_where_shapes_are_compiled_each_new_one_gets_time_for_it() -> None:
    deadlines = Deadlines(compiles=True)
    assert deadlines.of(step_of(0, tokens=8)) == 180.0
    assert deadlines.of(step_of(1, 4)) == 60.0
    assert deadlines.of(step_of(2)) == 4.0  # the same rows as before
    assert deadlines.of(step_of(3, 5)) == 60.0
    assert deadlines.of(step_of(4, 4)) == 4.0
    assert deadlines.of(step_of(5, top_k=20)) == 60.0  # another kind of sampling
    assert deadlines.of(step_of(6, 4, top_k=30)) == 4.0
    assert deadlines.of(step_of(7, 4, tokens=100)) == 60.0  # and prompt tokens beside the rows
    assert deadlines.of(step_of(8, 4, tokens=101)) == pytest.approx(4 + 101 * 0.002)
    for number in range(8):
        deadlines.observe(step_of(number, 4, tokens=100), 9.0)  # the sixth has waited for the seventh's compilation
    assert deadlines.of(step_of(9, 4, tokens=100)) == pytest.approx(4 + 100 * 0.002), "compilation is no measure"
    deadlines.observe(step_of(8, 4, tokens=101), 9.0, captured=True)
    deadlines.observe(step_of(8, 4, tokens=101), 1.01)
    assert deadlines.of(step_of(10, 4, tokens=100)) == pytest.approx(4 + 8 * 100 * 0.01)
    assert deadlines.of(step_of(11, wide=True)) == 60.0, "a row has become long"
    assert deadlines.of(step_of(12, wide=True)) == deadlines.of(step_of(13)) == 4.0
    deadlines.restart()
    assert deadlines.of(step_of(9, 4)) == 60.0


def test_a_step_gets_the_time_that_the_one_launched_before_its_answer_may_take() -> None:
    executor = FakeExecutor(tiny_capacity())
    core = EngineCore(executor, executor.start(), ScheduleOptions(depth=2), compiles=True)
    core.add(request(0, max_tokens=20))
    while executor.num_collected < 8:
        core.step()
    assert executor.timeouts[-1] == 4.0
    core.add(request(1))
    executor.timeouts.clear()
    core.step()  # launches its prompt beside the row, which is new, and collects the step before it
    core.step()
    assert executor.timeouts == [60.0, 60.0]


def test_idle_steps_get_time_to_compile_and_leave_the_first_step_the_first() -> None:
    deadlines = Deadlines(compiles=True)
    assert [deadlines.of_idle(step_of(n)) for n in range(3)] == [180.0, 60.0, 60.0]
    assert deadlines.of(step_of(3, tokens=8)) == 180.0
    deadlines.observe(step_of(3, tokens=8), 100.0)
    assert deadlines.of(step_of(4, 1)) == 60.0
    assert deadlines.of_idle(step_of(5)) == 60.0
    assert deadlines.of(step_of(6, 1, tokens=9)) == 60.0
    assert deadlines.of(step_of(7, 1, tokens=10)) == pytest.approx(4 + 10 * 0.002), "nothing was learnt from the first"
    deadlines.restart()
    assert deadlines.of(step_of(0, 1)) == 180.0


def test_the_first_step_of_an_epoch_gets_what_its_prompts_and_guides_need_as_well() -> None:
    deadlines = Deadlines()
    assert deadlines.of(step_of(0, tokens=2048)) == pytest.approx(4 + 2048 * 0.02)  # a large model on a few cores
    deadlines.observe(step_of(1, tokens=100), 1.0)
    deadlines.restart()
    assert deadlines.of(step_of(0, tokens=1000)) == pytest.approx(4 + 8 * 1000 * 0.01)
    assert deadlines.of(step_of(0, tokens=8, guided=True)) == 60.0  # all guided requests come back in this step
    assert deadlines.of(step_of(0, tokens=8)) == 20.0


def test_rows_that_run_as_one_size_are_one_shape_and_no_step_outlasts_the_engines_own_silence() -> None:
    deadlines = Deadlines(compiles=True)
    assert deadlines.of(step_of(0, 9)) == 180.0
    assert [deadlines.of(step_of(n, n)) for n in (10, 16, 17, 24, 70, 80, 81)] == [4.0, 4.0, 60.0, 4.0, 60.0, 4.0, 60.0]
    assert deadlines.of(step_of(90, 4, tokens=16384)) == 60.0, "a rate nobody has measured is a GPU's"
    assert Deadlines().of(step_of(1, tokens=16384)) == 200.0 < SILENCE_S


def test_a_guide_gets_time_to_be_made_ready() -> None:
    deadlines = Deadlines()
    assert deadlines.of(step_of(1, tokens=8, guided=True)) == 60.0
    assert deadlines.of(step_of(2, 1)) == 4.0


def test_a_draining_core_finishes_what_it_has_and_refuses_more() -> None:
    core = core_over(FakeExecutor())
    core.add(request(0))
    core.drain()
    with pytest.raises(Overloaded) as caught:
        core.add(request(1))
    assert (caught.value.status, caught.value.code) == (503, "draining")
    assert outputs(drive(core)) == {"0": expected_tokens(request(0), 12)}
    core.reopen()
    core.add(request(2))
    assert outputs(drive(core)) == {"2": expected_tokens(request(2), 12)}


def test_what_waits_is_counted_and_what_cannot_fit_is_refused() -> None:
    core = core_over(FakeExecutor(tiny_capacity(max_num_seqs=1)))
    for i in range(3):
        core.add(request(i))
    assert (core.num_waiting, core.waiting_tokens) == (3, 30)
    core.step()
    assert (core.num_waiting, core.waiting_tokens) == (2, 20)
    with pytest.raises(RequestError, match="context holds 96"):
        core.add(request(9, prompt=200))
    assert core.capacity.max_model_len == 96


def test_a_resubmitted_request_that_was_complete_ends_without_a_step() -> None:
    executor = FakeExecutor()
    core = core_over(executor)
    core.add(GenerateRequest(id="x", prompt_ids=[1], params=SamplingParams(), max_tokens=2, seed=0, output_ids=[3, 4]))
    assert [d.finish_reason for d in core.step().deltas] == [FinishReason.LENGTH]
    assert executor.steps == []
    assert not core.has_work


def test_stats_measure_each_step_from_the_end_of_the_one_before() -> None:
    core = core_over(FakeExecutor())
    core.add(request(0))
    measured = [r.stats for r in iter(lambda: core.step() if core.has_work else None, None) if r.stats]
    assert len(measured) == 12
    assert all(0 < s.duration_s < 1 for s in measured)
    assert sum(s.output_tokens for s in measured) == 12


@pytest.mark.parametrize("asked", [False, True])
def test_each_step_is_logged_with_its_requests_when_asked(monkeypatch: pytest.MonkeyPatch, asked: bool) -> None:
    lines: list[str] = []
    log = logging.getLogger("tpqwen.engine.core")
    monkeypatch.setattr(log, "isEnabledFor", lambda level: asked)
    monkeypatch.setattr(log, "debug", lambda text, *values: lines.append(text % values))
    core = core_over(FakeExecutor(), depth=1)
    core.add(request(7, max_tokens=2))
    drive(core)
    assert ("submit step=0 prompts=7:0+10" in lines) == asked
    collected = [line.rpartition(" ")[2] for line in lines if line.startswith("collect")]
    assert collected == (["outputs=7:0+1", "outputs=7:1+1"] if asked else [])
