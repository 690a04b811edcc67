"""What the scheduler decides in single situations; random workloads are in test_scheduler_random."""

from __future__ import annotations

from typing import Any

import pytest

from tests.fakes import FakeExecutor, expected_tokens, tiny_capacity
from tpqwen.errors import EngineError, RequestError
from tpqwen.request import Delta, FinishReason, GenerateRequest, SamplingParams
from tpqwen.scheduler.scheduler import Scheduler
from tpqwen.step import Capacity, Chunk, StepInput, StepOutput, ints, packed

ROOMY = tiny_capacity(num_blocks=200, max_batched_tokens=64)


def request(name: str, prompt: int | list[int] = 5, max_tokens: int = 10, **changes: Any) -> GenerateRequest:
    """A prompt given by length has tokens of its own."""
    ids = [sum(name.encode()) + i for i in range(prompt)] if isinstance(prompt, int) else prompt
    params = changes.pop("params", SamplingParams())
    return GenerateRequest(id=name, prompt_ids=ids, params=params, max_tokens=max_tokens, seed=1, **changes)


class Pair:
    """A scheduler and a fake group of ranks, one step at a time unless told otherwise."""

    def __init__(self, capacity: Capacity = ROOMY, **options: Any) -> None:
        self.executor = FakeExecutor(capacity, depth=4, **options)
        self.scheduler = Scheduler(capacity)
        self.deltas: list[Delta] = []

    def add(self, *requests: GenerateRequest) -> None:
        for r in requests:
            assert self.scheduler.add(r, 0.0) is None

    def submit(self, now: float = 0.0, gentle: int | None = None) -> StepInput:
        step = self.scheduler.schedule(now, gentle)
        assert step is not None
        self.executor.submit(step)
        self.scheduler.check()
        return step

    def collect(self) -> list[Delta]:
        deltas = list(self.scheduler.update(self.executor.collect(1.0)))
        self.scheduler.check()
        self.deltas += deltas
        return deltas

    def step(self, gentle: int | None = None) -> StepInput:
        step = self.submit(gentle=gentle)
        self.collect()
        return step

    def run(self) -> list[Delta]:
        while self.scheduler.num_in_flight:
            self.collect()
        while self.scheduler.has_work:
            self.step()
        return self.deltas

    def tokens(self, name: str) -> list[int]:
        return [t for d in self.deltas if d.id == name for t in d.token_ids]


def slots_of(step: StepInput) -> list[int]:
    assert step.decode is not None
    return [int(slot) for slot in ints(step.decode)]


def test_a_prompt_is_admitted_computed_sampled_and_then_decodes() -> None:
    pair = Pair()
    pair.add(request("a", [7, 8, 9, 10, 11]))
    first = pair.step()
    assert [(a.slot, a.out_index, a.num_prompt) for a in first.admits] == [(0, 0, 5)]
    assert ints(first.blocks, -1, 3).tolist() == [[0, 0, 1], [0, 1, 2]]
    assert [(c.slot, c.start, ints(c.token_ids).tolist(), c.sample) for c in first.chunks] == [
        (0, 0, [7, 8, 9, 10, 11], True)
    ]
    assert slots_of(first) == []
    second = pair.step()
    assert (second.admits, second.blocks, second.chunks, slots_of(second)) == ((), b"", (), [0])


def test_steady_decode_sends_nothing_but_numbers() -> None:
    pair = Pair()
    pair.add(request("a"), request("b"))
    pair.step()
    pair.step()
    step = pair.step()
    assert (step.admits, step.blocks, step.chunks, step.decode) == ((), b"", (), None)


def test_decode_rows_come_before_a_long_prompt_which_takes_what_is_left() -> None:
    pair = Pair(tiny_capacity(max_batched_tokens=8, num_blocks=100))
    pair.add(request("a", 4), request("b", 4))
    pair.step()
    pair.add(request("long", 30))
    chunks: list[Chunk] = []
    while not chunks or not chunks[-1].sample:
        step = pair.step()
        assert step.decode is None or slots_of(step) == [0, 1]
        chunks += step.chunks
    assert [c.num_tokens for c in chunks] == [6, 6, 6, 6, 6]
    assert [c.start for c in chunks] == [0, 6, 12, 18, 24]
    assert [c.sample for c in chunks] == [False] * 4 + [True]


def test_a_prompt_is_not_begun_with_a_scrap_of_a_step() -> None:
    pair = Pair(tiny_capacity(num_blocks=900, max_batched_tokens=160, max_model_len=900))
    pair.add(request("a", 152), request("b", list(range(1000, 1160))), request("c", list(range(2000, 2009))))
    assert [c.num_tokens for c in pair.step().chunks] == [152], "eight of 160 tokens are left"
    assert [c.num_tokens for c in pair.step().chunks] == [159], "decode rows come first"
    assert [c.num_tokens for c in pair.step().chunks] == [1, 9], "what fits whole is no scrap"


def test_lower_priority_values_are_prefilled_first_even_if_they_came_later() -> None:
    pair = Pair(tiny_capacity(max_batched_tokens=8, num_blocks=100))
    pair.add(request("late", 20, priority=1), request("first", 20), request("second", 20))
    pair.step()
    pair.add(request("urgent", 8, priority=-1))
    step = pair.step()
    assert [c.num_tokens for c in step.chunks] == [8]
    assert pair.tokens("urgent") != []
    assert [d.id for d in pair.run() if d.index == 0] == ["urgent", "first", "second", "late"]


def test_the_end_token_is_delivered_and_ends_the_request() -> None:
    prompt = [1, 2, 3]
    end = expected_tokens(request("a", prompt), 4)[3]
    pair = Pair()
    pair.add(request("a", prompt, end_ids=(end,)))
    last = pair.run()[-1]
    assert (last.finish_reason, last.stop_id, last.token_ids, last.index) == (FinishReason.STOP, end, [end], 3)
    assert pair.scheduler.pool.num_used == 0


def test_an_end_token_below_min_tokens_does_not_end_the_request() -> None:
    pair = Pair(next_token=lambda history, params, index: 5)
    pair.add(request("a", end_ids=(5,), params=SamplingParams(min_tokens=3)))
    last = pair.run()[-1]
    assert (last.index, last.finish_reason) == (3, FinishReason.STOP)


@pytest.mark.parametrize("count", [1, 4, 5, 40])
def test_any_number_of_end_ids_is_honoured(count: int) -> None:
    pair = Pair(next_token=lambda history, params, index: 300 + index)
    pair.add(request("a", end_ids=tuple(range(302 + 1 - count, 303))), request("b"))
    pair.run()
    assert pair.tokens("a") == [300, 301, 302][: max(1, 4 - count)]
    assert len(pair.tokens("b")) == 10


def test_max_tokens_is_never_exceeded_by_steps_scheduled_ahead() -> None:
    pair = Pair()
    pair.add(request("a", max_tokens=3))
    for _ in range(3):
        pair.submit()
    assert pair.scheduler.schedule(0.0) is None
    assert [pair.collect()[0].finish_reason for _ in range(3)] == [None, None, FinishReason.LENGTH]


def test_the_context_limit_ends_a_request_by_length() -> None:
    pair = Pair(tiny_capacity(max_model_len=20, num_blocks=50))
    pair.add(request("a", 15, max_tokens=100))
    assert pair.run()[-1].finish_reason is FinishReason.LENGTH
    assert len(pair.tokens("a")) == 5


def test_a_sequence_may_fill_the_whole_cache_alone() -> None:
    pair = Pair(tiny_capacity(num_blocks=6))
    pair.add(request("a", 3, max_tokens=1000), request("b", 3, max_tokens=1000))
    pair.run()
    assert [len(pair.tokens(n)) for n in "ab"] == [17, 17]


@pytest.mark.parametrize(("blocks", "length"), [(33, 96), (33, 500), (11, 40)])
def test_a_prompt_that_can_never_fit_is_refused_with_both_numbers(blocks: int, length: int) -> None:
    scheduler = Scheduler(tiny_capacity(num_blocks=blocks))
    limit = min(96, 4 * (blocks - 1))
    with pytest.raises(RequestError, match=f"{length} tokens, but the context holds {limit}") as caught:
        scheduler.add(request("a", length), 0.0)
    assert caught.value.code == "context_length_exceeded"
    assert not scheduler.has_work


def test_an_empty_prompt_and_an_id_in_use_are_refused() -> None:
    scheduler = Scheduler(ROOMY)
    with pytest.raises(RequestError, match="no tokens"):
        scheduler.add(request("a", []), 0.0)
    scheduler.add(request("a"), 0.0)
    with pytest.raises(RequestError, match="'a' is in use"):
        scheduler.add(request("a"), 0.0)


def test_a_row_with_nan_ends_alone_and_what_it_computed_is_not_found_again() -> None:
    bad = list(range(50, 60))
    pair = Pair(is_bad=lambda history, params: history[:10] == bad and len(history) == 11)
    good = request("good")
    pair.add(request("bad", bad), good)
    deltas = pair.run()
    last = next(d for d in deltas if d.id == "bad" and d.finish_reason)
    assert (last.finish_reason, last.error_code, last.index, last.token_ids) == (
        FinishReason.ERROR,
        "numerical_error",
        1,
        [],
    )
    assert pair.tokens("good") == expected_tokens(good, 10)
    again = request("again", bad, max_tokens=1)
    pair.add(again)
    assert pair.step().chunks[0].start == 0
    assert pair.deltas[-1].cached_tokens == 0


def test_a_repeated_prompt_is_taken_from_the_cache_but_for_its_last_block() -> None:
    pair = Pair()
    ids = list(range(16))
    pair.add(request("a", ids))
    pair.run()
    pair.add(request("b", ids), request("salted", ids, cache_salt="x"), request("longer", [*ids, 1, 2, 3]))
    step = pair.step()
    assert [(c.start, c.num_tokens) for c in step.chunks] == [(12, 4), (0, 16), (16, 3)]
    first = {d.id: d.cached_tokens for d in pair.deltas if d.index == 0}
    assert first == {"a": 0, "b": 12, "salted": 0, "longer": 16}
    stats = pair.scheduler.step_stats(0.5, 0.25, None, 0.125)
    assert (stats.prefix_queried_tokens, stats.prefix_hit_tokens) == (16 + 16 + 16 + 19, 28)


def test_output_tokens_are_shared_too_once_the_sequence_has_ended() -> None:
    pair = Pair()
    first = request("a", list(range(6)), max_tokens=11)
    pair.add(first)
    pair.run()
    pair.add(request("b", [*range(6), *expected_tokens(first, 11), 1, 2]))
    assert pair.step().chunks[0].start == 16


def test_choices_of_one_prompt_wait_for_the_first_and_share_its_blocks() -> None:
    pair = Pair(tiny_capacity(num_blocks=100, max_batched_tokens=8))
    ids = list(range(18))
    pair.add(*(request(f"c{i}", ids, choice=i) for i in range(3)), request("other", 2))
    while not pair.deltas or len({d.id for d in pair.deltas}) < 4:
        pair.step()
    assert {d.id: d.cached_tokens for d in pair.deltas if d.index == 0} == {"c0": 0, "c1": 16, "c2": 16, "other": 0}
    tables = [s.blocks[:4] for s in pair.scheduler._rows.running if s.request.id != "other"]
    assert tables[0] == tables[1] == tables[2]


def test_others_do_not_wait_behind_a_choice_that_waits() -> None:
    pair = Pair(tiny_capacity(num_blocks=100, max_batched_tokens=20))
    ids = list(range(18))
    pair.add(request("c0", ids), request("c1", ids), request("other", 2))
    assert [c.num_tokens for c in pair.step().chunks] == [18, 2]


def test_a_waiting_choice_goes_on_alone_when_the_first_is_aborted() -> None:
    pair = Pair(tiny_capacity(num_blocks=100, max_batched_tokens=8))
    ids = list(range(18))
    pair.add(request("c0", ids), request("c1", ids))
    pair.submit()
    assert pair.scheduler.abort("c0") is not None
    step = pair.submit()
    assert [(len(step.admits), c.start) for c in step.chunks] == [(1, 0)]


def test_an_urgent_request_does_not_wait_for_a_less_urgent_one_with_its_prefix() -> None:
    pair = Pair(tiny_capacity(num_blocks=100, max_batched_tokens=8))
    ids = list(range(18))
    pair.add(request("slow", ids, priority=5))
    pair.step()
    pair.add(request("urgent", ids, priority=0))
    step = pair.step()
    assert len(step.admits) == 1
    assert step.chunks[0].start == 8  # what the slow one has settled is shared all the same


def test_the_youngest_of_the_lowest_priority_is_preempted_and_resumes_with_the_same_tokens() -> None:
    pair = Pair(tiny_capacity(num_blocks=16, max_batched_tokens=32))
    requests = [request("old", 6, 40), request("urgent", 6, 40, priority=-1), request("young", 6, 40)]
    pair.add(*requests)
    preempted: list[str] = []
    while pair.scheduler.has_work:
        before = {s.request.id for s in pair.scheduler._rows.running}
        pair.step()
        after = {s.request.id for s in pair.scheduler._rows.running}
        preempted += sorted(n for n in before - after if n in pair.scheduler._sequences)
    assert preempted[0] == "young"
    assert "urgent" not in preempted
    for r in requests:
        assert pair.tokens(r.id) == expected_tokens(r, 40)


def test_a_preempted_sequence_is_cheap_to_recompute_while_its_blocks_are_cached() -> None:
    pair = Pair(tiny_capacity(num_blocks=24, max_batched_tokens=32))
    pair.add(request("a", 20, 30), request("b", 20, 60))
    starts = [c.start for s in iter(lambda: pair.step() if pair.scheduler.has_work else None, None) for c in s.chunks]
    assert starts == [0, 0, 12, 40]  # the prompts, the second in two chunks; then b again from its cached blocks on


def test_blocks_are_given_ahead_and_taken_back_under_pressure() -> None:
    pair = Pair(tiny_capacity(num_blocks=30, max_num_seqs=3, max_batched_tokens=64))
    pair.add(request("a", 4, 60))
    pair.step()
    pair.step()
    assert len(pair.scheduler._rows.running[0].blocks) == 5  # one of the prompt, four ahead
    pair.add(request("b", 50, 20))
    while pair.scheduler.has_work:
        pair.step()
        assert pair.scheduler._tally.preemptions == 0 or pair.scheduler.pool.num_available < 3
    assert len(pair.tokens("a")) == 60


def test_an_abort_is_answered_once_in_every_state() -> None:
    pair = Pair()
    pair.add(request("a"), request("b", 40), request("c"))
    assert pair.scheduler.abort("c").finish_reason is FinishReason.ABORT  # type: ignore[union-attr]
    pair.submit()
    for name in "ab":
        delta = pair.scheduler.abort(name)
        assert delta is not None
        assert (delta.finish_reason, delta.token_ids) == (FinishReason.ABORT, [])
        assert pair.scheduler.abort(name) is None
    assert pair.collect() == []
    assert pair.scheduler.abort("never there") is None
    assert pair.scheduler.pool.num_used == 0
    assert not pair.scheduler.has_work


def test_a_slot_taken_over_while_its_last_step_is_in_flight_gets_no_foreign_token() -> None:
    pair = Pair(tiny_capacity(max_num_seqs=1, num_blocks=50))
    pair.add(request("a"), request("b"))
    pair.submit()
    pair.submit()
    pair.scheduler.abort("a")
    assert [a.slot for a in pair.submit().admits] == [0]
    assert (pair.collect(), pair.collect()) == ([], [])
    assert [d.id for d in pair.collect()] == ["b"]
    pair.run()
    assert pair.tokens("b") == expected_tokens(request("b"), 10)


def test_a_chunk_in_flight_does_not_count_for_a_sequence_that_was_preempted_and_came_back() -> None:
    pair = Pair(tiny_capacity(max_batched_tokens=8, num_blocks=60))
    pair.add(request("a", 3), request("b", 30))
    pair.step()
    stale = pair.submit()  # b's second chunk
    pair.scheduler._preempt(pair.scheduler._sequences["b"])
    pair.add(request("urgent", 2, priority=-1))  # takes b's slot, so b comes back in another, of the same generation
    assert [c.start for c in pair.submit().chunks] == [0, 4]
    assert stale.chunks[0].start == 5
    pair.collect()
    assert pair.scheduler._sequences["b"].settled == 4
    pair.run()
    assert pair.tokens("b") == expected_tokens(request("b", 30), 10)


def test_a_resubmitted_request_goes_on_after_its_output() -> None:
    whole = request("a", params=SamplingParams(presence_penalty=1.0))
    tokens = expected_tokens(whole, 10)
    pair = Pair()
    pair.add(request("a", output_ids=tokens[:4], params=whole.params))
    step = pair.step()
    assert (step.admits[0].out_index, step.admits[0].num_prompt) == (4, 5)
    assert ints(step.admits[0].history).tolist() == [*whole.prompt_ids, *tokens[:4]]
    pair.run()
    assert pair.tokens("a") == tokens[4:]
    assert [d.index for d in pair.deltas] == list(range(4, 10))


@pytest.mark.parametrize(
    ("output", "reason"), [([9, 9, 9], FinishReason.LENGTH), ([9, 5], FinishReason.STOP), ([5], None)]
)
def test_a_resubmitted_request_that_was_complete_ends_at_once(output: list[int], reason: FinishReason | None) -> None:
    scheduler = Scheduler(ROOMY)
    params = SamplingParams(min_tokens=1)
    delta = scheduler.add(request("a", max_tokens=3, end_ids=(5,), output_ids=output, params=params), 0.0)
    assert (delta.finish_reason if delta else None) is reason
    if delta:
        assert (delta.index, delta.token_ids) == (len(output), [])
    assert scheduler.has_work == (reason is None)


def test_after_a_reset_everything_is_recomputed_in_the_old_order_and_nothing_is_sent_twice() -> None:
    pair = Pair(tiny_capacity(max_num_seqs=2, num_blocks=60, max_batched_tokens=64))
    requests = [request(n, 6, 12) for n in "abc"]
    pair.add(*requests)
    for _ in range(4):
        pair.step()
    pair.submit()
    pair.submit()
    late = pair.executor.collect(1.0)
    pair.executor.restart(7)
    assert pair.scheduler.reset(7, pair.scheduler.capacity) == []
    pair.scheduler.check()
    assert not pair.scheduler.update(late)
    step = pair.submit()
    assert (step.epoch, step.step, len(step.admits)) == (7, 0, 2)
    assert [c.start for c in step.chunks] == [0, 0]
    resumed = pair.collect()
    assert [(d.id, d.resumed) for d in resumed] == [("a", 1), ("b", 1)]
    pair.run()
    for r in requests:
        assert pair.tokens(r.id) == expected_tokens(r, 12)
    assert [d.resumed for d in pair.deltas if d.finish_reason] == [1, 1, 0]


def test_a_reset_to_a_smaller_cache_ends_only_what_no_longer_fits() -> None:
    pair = Pair()
    pair.add(request("small", 4, 50), request("large", 30))
    pair.step()
    small = tiny_capacity(num_blocks=6)
    deltas = pair.scheduler.reset(1, small)
    assert [(d.id, d.error_code) for d in deltas] == [("large", "context_length_exceeded")]
    pair.executor = FakeExecutor(small, epoch=1)
    pair.run()
    assert len(pair.tokens("small")) == 16


def test_an_unexpected_result_is_an_engine_error() -> None:
    pair = Pair()
    with pytest.raises(EngineError, match="got step 0 with 0 rows, expected no step"):
        pair.scheduler.update(StepOutput(0, 0, b""))
    pair.add(request("a"))
    pair.submit()
    with pytest.raises(EngineError, match="got step 0 with 2 rows, expected step 0 with 1 rows"):
        pair.scheduler.update(StepOutput(0, 0, packed([1, 2])))


def test_queue_time_and_log_probabilities_arrive_with_the_right_rows() -> None:
    pair = Pair()
    pair.add(request("a"), request("b", params=SamplingParams(logprobs=2)))
    pair.submit(now=2.5)
    a, b = pair.collect()
    assert (a.queue_s, b.queue_s, a.logprobs) == (2.5, 2.5, None)
    assert b.logprobs is not None
    assert b.logprobs[0].top_ids == b.token_ids
    pair.submit()
    pair.scheduler.abort("a")
    (b,) = pair.collect()
    assert b.logprobs is not None
    assert (b.logprobs[0].top_ids, b.queue_s) == (b.token_ids, None)


def test_stats_describe_the_step_that_was_collected() -> None:
    pair = Pair(tiny_capacity(num_blocks=50))
    pair.add(request("a", 10), request("b", 10))
    stats = []
    for _ in range(3):
        pair.step()
        stats.append(pair.scheduler.step_stats(0.1, 0.05, None, 0.0))
    assert [s.phase for s in stats] == ["prefill", "mixed", "decode"]
    assert [(s.num_tokens, s.prompt_tokens, s.output_tokens) for s in stats] == [(16, 16, 1), (5, 4, 2), (2, 0, 2)]
    assert (stats[2].num_running, stats[2].num_waiting, stats[2].preemptions) == (2, 0, 0)
    assert stats[2].blocks_used + stats[2].blocks_cached + stats[2].blocks_free == 49


def test_the_ends_of_all_requests_come_when_the_ranks_are_lost_for_good() -> None:
    pair = Pair(tiny_capacity(max_num_seqs=1))
    pair.add(request("a"), request("b"))
    pair.submit()
    deltas = pair.scheduler.fail_all("gone", "rank_dead")
    assert [(d.id, d.finish_reason, d.error, d.error_code) for d in deltas] == [
        (n, FinishReason.ERROR, "gone", "rank_dead") for n in "ab"
    ]
    assert not pair.scheduler.has_work


def test_check_notices_a_block_that_nobody_holds() -> None:
    pair = Pair()
    pair.add(request("a"))
    pair.step()
    pair.scheduler.pool.allocate(1)
    with pytest.raises(EngineError, match="other reference counts"):
        pair.scheduler.check()
