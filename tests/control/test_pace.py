"""The prompt tokens that a step may take on beside running streams."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.control.test_scheduler import Pair, request
from tests.fakes import FakeExecutor, tiny_capacity
from tpqwen.engine.core import EngineCore
from tpqwen.request import GenerateRequest, SamplingParams
from tpqwen.scheduler.pace import FRESH, LEAST, STALL, Pace, Room, tokens_within, work_of
from tpqwen.step import Chunk, StepInput, StepStats, ints, packed, token_bucket


def stats(phase: str, duration_s: float, prompt_tokens: int = 0, rows: int = 8) -> StepStats:
    num_tokens = prompt_tokens + (rows if phase != "prefill" else 0)
    return StepStats(duration_s, phase, num_tokens, 0, 0, 0, 0, 0, 0, 0, 0, prompt_tokens, 0)


def chunk(start: int, tokens: int) -> StepInput:
    return StepInput(0, 0, (), b"", (Chunk(0, start, packed([1] * tokens), True),), None)


DECODE = StepInput(0, 0, (), b"", (), None)


def test_nothing_is_limited_before_both_costs_are_known() -> None:
    pace = Pace(0.0)
    pace.observe(DECODE, stats("decode", 0.01))
    assert pace.limit is None
    pace.observe(chunk(0, LEAST - 1), stats("mixed", 0.05, LEAST - 1))  # too few tokens to measure by
    assert pace.limit is None


def test_the_limit_is_what_some_decode_steps_of_time_can_compute() -> None:
    pace = Pace(0.0)
    pace.observe(DECODE, stats("decode", 0.01))
    pace.observe(chunk(0, 10_000), stats("prefill", 0.1, 10_000))
    assert pace.limit == pytest.approx(STALL * 0.01 / 1e-5)
    for _ in range(100):  # prompt tokens have become ten times as expensive; the decode rows' own part does not count
        pace.observe(chunk(0, 1000), stats("mixed", 0.11, 1000))
        pace.observe(DECODE, stats("decode", 0.01))
    assert pace.limit == pytest.approx(STALL * 0.01 / 1e-4)


def test_steps_with_prompts_alone_count_only_until_a_mixed_one_was_seen() -> None:
    pace = Pace(0.0)
    pace.observe(DECODE, stats("decode", 0.01))
    for phase, duration_s in (("prefill", 0.1), ("mixed", 0.11), ("prefill", 0.4)):
        pace.observe(chunk(0, 10_000), stats(phase, duration_s, 10_000))
        assert pace.limit == pytest.approx(STALL * 0.01 / 1e-5)


def test_a_decode_step_is_wanted_when_the_last_was_long_ago_or_had_other_rows() -> None:
    pace = Pace(0.0)
    for rows in (8, 32):
        pace.observe(DECODE, stats("decode", 0.01, rows=rows))
        pace.observe(chunk(0, 1000), stats("mixed", 0.02, 1000, rows))
        limit = pace.limit
        assert limit
        pace.observe(chunk(0, 1000), stats("mixed", 0.02, 1000, rows + rows // 4))
        assert pace.limit == pytest.approx(limit), "about as many rows"
        pace.observe(chunk(0, 1000), stats("mixed", 0.02, 1000, 2 * rows))
        assert pace.limit == 0
        pace.observe(DECODE, stats("decode", 0.03, rows=2 * rows))
        assert pace.limit == pytest.approx(3 * limit), "of other rows nothing is kept"
        for _ in range(FRESH):
            assert pace.limit
            pace.observe(chunk(0, 1000), stats("mixed", 0.04, 1000, 2 * rows))
        assert pace.limit == 0


def test_one_slow_step_counts_for_a_few_times_the_usual_at_most() -> None:
    pace = Pace(0.0)
    for _ in range(3):
        pace.observe(DECODE, stats("decode", 0.01))
        pace.observe(chunk(0, 1000), stats("mixed", 0.02, 1000))
    pace.observe(chunk(0, 1000), stats("mixed", 30.0, 1000))
    assert pace.limit == pytest.approx(STALL * 0.01 / (0.8e-5 + 0.2 * 4e-5))


def test_tokens_that_see_a_long_context_count_for_more() -> None:
    assert work_of(0, 100, 0.0) == 100
    assert work_of(1000, 100, 0.01) == 100 * (1 + 10.5)
    for start in (0, 1000, 20_000):
        tokens = tokens_within(9000, start, 0.001)
        assert work_of(start, tokens, 0.001) == pytest.approx(9000, rel=0.1)
    assert tokens_within(1.0, 50_000, 0.001) == LEAST


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
    for name in ("b", "c", "d"):
        add(name, [5000 + ord(name)] * 5)
    for _ in range(10):
        core.step()
    add("long", list(range(1, 3001)))
    while core.has_work:
        core.step()
    chunks = [t for t in taken[1:] if t]
    assert taken[0] == 615
    assert sum(chunks) == 3000
    assert max(chunks) < 2048 / 2, "both streams go on while the long prompt is computed in pieces"


def test_a_long_prompt_is_computed_gently_only_while_streams_outnumber_prompts() -> None:
    pair = Pair(tiny_capacity(num_blocks=900, max_batched_tokens=600, max_model_len=900))
    pair.add(*(request(name, max_tokens=50) for name in "abcdef"))
    pair.step()
    pair.add(request("long", 800))
    step = pair.step(gentle=200.0)
    assert step.num_chunk_tokens == 200
    assert step.decode is not None
    assert len(ints(step.decode)) == 6
    pair.add(request("other", 300))
    assert pair.step(gentle=200.0).num_chunk_tokens == 594, "six streams do not outnumber two prompts four times"


def test_beside_streams_a_gentle_step_is_one_that_has_a_graph() -> None:
    sizes = {"graph_tokens": 64, "graph_chunks": 2}
    pair = Pair(tiny_capacity(num_blocks=900, max_batched_tokens=600, max_model_len=900, max_num_seqs=24, **sizes))
    pair.add(*(request(f"stream {i}", max_tokens=50) for i in range(16)))
    assert len(pair.step().chunks) == 16, "nobody waits for a pass without streams"
    pair.add(*(request(f"short {i}", 10) for i in range(3)))
    assert [c.num_tokens for c in pair.step(gentle=200.0).chunks] == [10, 10]
    pair.run()
    pair.add(*(request(f"again {i}", max_tokens=50) for i in range(16)))
    pair.step()
    pair.add(request("long", 300))
    assert pair.step(gentle=200.0).num_chunk_tokens == 64
    assert pair.step().num_chunk_tokens == 236, "it is not to be gentle"


def test_a_crowd_of_short_prompts_runs_as_graphs_where_launching_would_take_longer() -> None:
    sizes = {"max_batched_tokens": 4096, "max_model_len": 4000, "graph_tokens": 2048, "graph_chunks": 8}
    pair = Pair(tiny_capacity(num_blocks=4000, max_num_seqs=24, launch_tokens=7_500, **sizes))
    pair.add(*(request(f"short {i}", 600) for i in range(5)), request("long", 2500), request("last", 100))
    steps = [[c.num_tokens for c in pair.step().chunks] for _ in range(3)]
    assert steps == [[600, 600, 600, 248], [352, 600], [2500, 100]], "the long one at once, and others with it"
    pair.add(request("middling", 2400))
    assert [[c.num_tokens for c in pair.step().chunks] for _ in range(2)] == [[2048], [352]]
    pair.add(*(request(f"more {i}", 650) for i in range(3)), *(request(f"tiny {i}", 10) for i in range(9)))
    steps = [[c.num_tokens for c in pair.step().chunks] for _ in range(2)]
    assert steps == [[650] * 3 + [10] * 5, [10] * 4], "what is left is not worth a part, and a graph has but so many"


@pytest.mark.parametrize(
    ("launch_tokens", "watched", "first"),
    [
        (1000, True, [600] * 5),  # computing takes longer
        (2999, False, [600] * 5),  # so it does with all of them, and nobody waits for the first
        (3001, False, [600, 600, 600, 248]),
        (2999, True, [600, 600, 600, 248]),
    ],
)
def test_a_crowd_is_computed_at_once_where_launching_costs_nothing(
    launch_tokens: int, watched: bool, first: list[int]
) -> None:
    sizes = {"max_batched_tokens": 4096, "max_model_len": 4000, "graph_tokens": 2048, "graph_chunks": 8}
    pair = Pair(tiny_capacity(num_blocks=4000, max_num_seqs=24, launch_tokens=launch_tokens, **sizes))
    pair.add(*(request(f"short {i}", 600) for i in range(5)))
    step = pair.scheduler.schedule(0.0, watched=watched)
    assert step is not None and [c.num_tokens for c in step.chunks] == first


def test_a_graph_has_room_for_so_many_chunks() -> None:
    assert [token_bucket(300, n) for n in (1, 8, 9, 32, 33)] == [512, 512, 768, 768, 0]
    assert (token_bucket(2048, 32), token_bucket(2049), token_bucket(64)) == (2048, 0, 64)


def test_a_graph_is_filled_while_that_adds_little_attention() -> None:
    cost = 0.001
    capacity = msgspec.structs.replace(tiny_capacity(graph_tokens=2048, graph_chunks=8), context_cost=cost)
    for start, tokens in ((0, 512), (200, 256), (20_000, LEAST)):
        assert Room(4000, 300.0, capacity).tokens(start, 10_000) == tokens
    within = tokens_within(300, 1000, cost)  # where a token's attention is as much as its matrices
    assert 128 < within < 256
    assert Room(4000, 300.0, capacity).tokens(1000, 10_000) == within
    assert Room(4000, None, capacity).tokens(1000, 10_000) == 4000


@pytest.mark.parametrize(
    ("gentle", "chunks"),
    [
        (0.01, [128]),
        (LEAST - 30, [128]),
        (257, [512]),  # padded up to 512 tokens anyway
        (600, [600]),
        (600 + LEAST - 1, [600]),  # what is left is not worth another chunk
        (800, [600, 424]),
        (1100, [600, 600]),
    ],
)
def test_a_gentle_step_fills_its_graph(gentle: float, chunks: list[int]) -> None:
    sizes = {"graph_tokens": 2048, "graph_chunks": 8}
    pair = Pair(tiny_capacity(num_blocks=1900, max_batched_tokens=4096, max_model_len=900, max_num_seqs=24, **sizes))
    pair.add(*(request(f"stream {i}", max_tokens=50) for i in range(16)))
    pair.step()
    pair.add(*(request(f"prompt {i}", 600) for i in range(3)))
    assert [c.num_tokens for c in pair.step(gentle=gentle).chunks] == chunks


@settings(max_examples=300, derandomize=True, deadline=None, database=None)
@given(gentle=st.floats(0.0, 3000.0), budget=st.integers(1, 4000), prompts=st.lists(st.integers(1, 1500), max_size=12))
def test_filling_never_takes_a_larger_graph_than_the_limit_would(
    gentle: float, budget: int, prompts: list[int]
) -> None:
    room = Room(budget, gentle, tiny_capacity(max_batched_tokens=4096, graph_tokens=2048, graph_chunks=8))
    chunks: list[int] = []
    for length in prompts:
        if room.is_full:
            break
        chunks.append(min(length, room.tokens(0, length)))
        room.take(0, chunks[-1])
    assert len(chunks) <= 8 and sum(chunks) <= min(budget, 2048)
    assert min(chunks, default=1) > 0
    assert token_bucket(sum(chunks)) <= (token_bucket(max(int(gentle), LEAST)) or 2048)
    assert bool(chunks) == bool(prompts and gentle > 0), "however little is allowed, the first prompt gets on"


def test_without_graphs_a_gentle_step_takes_what_it_may() -> None:
    pair = Pair(tiny_capacity(num_blocks=900, max_batched_tokens=4096, max_model_len=900, max_num_seqs=24))
    pair.add(*(request(f"stream {i}", max_tokens=50) for i in range(16)))
    pair.step()
    pair.add(*(request(f"prompt {i}", 600) for i in range(3)))
    assert [c.num_tokens for c in pair.step(gentle=1100.0).chunks] == [600, 500]
