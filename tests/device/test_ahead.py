"""Graphs captured ahead: which and in what order, all ranks alike, and nothing of them is in the way of leaving."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks_in_threads import Meeting, ThreadGroup
from tests.tiny import tiny_checkpoint
from tpqwen.config import Config
from tpqwen.executor.rank_process import RankProcess
from tpqwen.offline import OfflineEngine
from tpqwen.parallel.group import TPGroup
from tpqwen.request import SamplingParams
from tpqwen.step import GIVEN_UP, LONG_ROW, MANY_CHUNKS, TOKEN_BUCKETS, Chunk, chunk_places, packed
from tpqwen.worker.ahead import Ahead, Pass, Prompt, least_free, planned, prompts, wide_variants, with_drafts
from tpqwen.worker.batch import Stager, chunk_parts, eager_chunks
from tpqwen.worker.graphs import DecodeGraphs, buckets
from tpqwen.worker.mixed import MixedGraphs, row_buckets
from tpqwen.worker.sampler import USUAL_KINDS, SampleKind
from tpqwen.worker.slots import SlotState
from tpqwen.worker.worker import Worker

GREEDY = SampleKind()


def possible(max_rows: int, max_tokens: int, max_length: int) -> set[tuple[int, int]]:
    """Buckets of all steps that a scheduler of these sizes may make, one by one."""
    at_most = min(max_rows, max_tokens)
    found = {(min(b for b in buckets(max_rows) if b >= rows), 0) for rows in range(1, at_most + 1)}
    for rows in range(at_most):
        width = min(b for b in row_buckets(max_rows) if b >= rows)
        for chunks in range(1, min(MANY_CHUNKS, at_most - rows) + 1):
            for tokens in range(chunks, min(max_tokens - rows, chunks * max_length, TOKEN_BUCKETS[-1]) + 1):
                found.add((width, min(t for t in TOKEN_BUCKETS if t >= tokens and chunk_places(t) >= chunks)))
    return found


@pytest.mark.parametrize("max_rows", [1, 2, 8, 9, 40])
@pytest.mark.parametrize("max_tokens", [1, 16, 70, 300, 1100])
@pytest.mark.parametrize("max_length", [40, 1000])
def test_exactly_what_steps_may_need_is_planned(max_rows: int, max_tokens: int, max_length: int) -> None:
    passes = planned(max_rows, max_tokens, max_length)
    assert len(set(passes)) == len(passes)
    assert {(p.rows, p.tokens) for p in passes} == possible(max_rows, max_tokens, max_length)
    assert {p.kind for p in passes} == set(USUAL_KINDS) and not any(p.wide for p in passes)


def test_the_most_usual_come_first_with_both_kinds_of_sampling() -> None:
    passes = planned(256, 8192, 40960)
    assert [p.kind for p in passes[::2]] == [SampleKind(candidates=True)] * (len(passes) // 2)
    sizes = [(p.rows, p.tokens) for p in passes[::2]]
    assert sizes == [(p.rows, p.tokens) for p in passes[1::2]]
    few = [(1, 0), (2, 0), (4, 0), (8, 0), *((rows, tokens) for tokens in TOKEN_BUCKETS for rows in (0, 8))]
    assert sizes[: len(few)] == few
    many = sizes[len(few) :]
    assert many == sorted(many), "with more and more streams, prompts beside them included"
    assert many[:4] == [(16, 0), (24, 0), (32, 0), (32, 64)] and many[-1] == (256, 2048)


@pytest.mark.parametrize("max_length", [LONG_ROW + 1, LONG_ROW + 2, 40960])
def test_wide_variants_are_planned_where_rows_may_be_long(max_length: int) -> None:
    usual = planned(40, 8192, max_length)
    wide = wide_variants(usual, max_length, lambda rows: rows > 2)
    expected = [Pass(p.rows, p.tokens, p.kind, wide=True) for p in usual if p.rows > 2]
    assert wide == (expected if max_length > LONG_ROW + 1 else [])
    assert {p.tokens for p in expected} == {0, *TOKEN_BUCKETS} and {p.kind for p in expected} == set(USUAL_KINDS)


@pytest.mark.parametrize(
    ("max_rows", "max_tokens", "widest"), [(256, 8192, 16), (12, 8192, 12), (256, 40, 8), (8, 7, 0)]
)
def test_speculative_passes_stand_behind_the_usual_ones_of_so_many_rows(
    max_rows: int, max_tokens: int, widest: int
) -> None:
    usual = planned(max_rows, max_tokens, 1000)
    passes = with_drafts(usual, max_tokens, 7)
    assert [p for p in passes if not p.drafts] == usual == with_drafts(usual, max_tokens, 0)
    found = {p._replace(drafts=0): p for p in passes if p.drafts}
    assert set(found) == {p for p in usual if not p.tokens and p.rows <= widest}
    assert all(passes[passes.index(p) + 1] == found[p] for p in found)


def test_a_speculative_pass_is_captured_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    device_with(monkeypatch, lambda: 50)
    graphs, drafts = Captures(), Captures()
    ahead = Ahead(TPGroup.single(), with_drafts([Pass(1, 0, GREEDY), Pass(0, 64, GREEDY)], 512, 5), 50)
    given: Any = (graphs, graphs, drafts)
    assert [ahead.capture(*given) for _ in range(3)] == [2, 1, 0]
    assert graphs.made == [(1, GREEDY, False), (0, 64, GREEDY, False)] and drafts.made == [(1, GREEDY, 5)]


class Captures:
    """What captures would be made, of one rank."""

    def __init__(self, already: set[Any] | None = None) -> None:
        self.made: list[Any] = []
        self.already = already or set()
        self.slots = torch.zeros(1)

    def prepare(self, *key: Any) -> bool:
        if key in self.already:
            return False
        self.made.append(key)
        return True

    def settle(self) -> None:
        """Nothing runs."""


def device_with(monkeypatch: pytest.MonkeyPatch, free: Callable[[], int], total: int = 100) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free(), total))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


def test_one_graph_a_step_but_none_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    device_with(monkeypatch, lambda: 50)
    passes = [Pass(1, 0, GREEDY), Pass(0, 64, GREEDY), Pass(2, 0, GREEDY), Pass(4, 0, GREEDY)]
    graphs: Any = Captures({(0, 64, GREEDY, False), (4, GREEDY, False)})
    ahead = Ahead(TPGroup.single(), passes, 50)
    assert len(ahead) == 4
    assert [ahead.capture(graphs, graphs, graphs) for _ in range(4)] == [3, 1, 0, 0]
    assert graphs.made == [(1, GREEDY, False), (2, GREEDY, False)]
    ahead.renew()
    assert len(ahead) == 4


class Compiling:
    """Kernels of the first `ready` passes are there."""

    def __init__(self, ready: int) -> None:
        self.ready = ready
        self.asked: list[int] = []
        self.closed = self.left = False

    def built(self, number: int, wait_s: float) -> bool:
        assert 0.0 < wait_s < 0.1, "a request that comes meanwhile waits as long"
        self.asked.append(number)
        return number <= self.ready

    def leave(self) -> None:
        self.left = True

    def close(self) -> None:
        self.closed = True


def test_a_pass_is_captured_when_its_kernels_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    device_with(monkeypatch, lambda: 50)
    graphs: Any = Captures({(2, GREEDY, False)})
    builder: Any = Compiling(1)
    ahead = Ahead(TPGroup.single(), [Pass(n, 0, GREEDY) for n in (1, 2, 4)], 50, builder)
    left = [ahead.capture(graphs, graphs, graphs) for _ in range(3)]
    assert left == [2, 2, 2] and graphs.made == [(1, GREEDY, False)] and builder.asked == [1, 2, 2]
    assert not builder.left
    builder.ready = 3
    assert ahead.capture(graphs, graphs, graphs) == 0 and graphs.made[1:] == [(4, GREEDY, False)]
    assert builder.left and not builder.closed
    ahead.close()
    assert builder.closed


def test_all_ranks_wait_for_the_one_whose_kernels_come_last(monkeypatch: pytest.MonkeyPatch) -> None:
    device_with(monkeypatch, lambda: 50)
    meeting = Meeting(2)

    def rank(number: int) -> tuple[list[int], list[Any]]:
        graphs: Any = Captures()
        builder: Any = Compiling(9 if number else 0)
        ahead = Ahead(ThreadGroup(number, 2, meeting), [Pass(n, 0, GREEDY) for n in (1, 2)], 50, builder)
        left = [ahead.capture(graphs, graphs, graphs)]
        builder.ready = 9
        left += [ahead.capture(graphs, graphs, graphs) for _ in range(2)]
        return left, graphs.made

    with ThreadPoolExecutor(2) as threads:
        for left, made in threads.map(rank, range(2)):
            assert left == [2, 1, 0] and made == [(1, GREEDY, False), (2, GREEDY, False)]


def test_the_first_rank_without_room_stops_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    here = threading.local()
    device_with(monkeypatch, lambda: here.free)
    meeting = Meeting(2)

    def rank(number: int) -> tuple[list[int], list[Any]]:
        graphs: Any = Captures()
        ahead = Ahead(ThreadGroup(number, 2, meeting), [Pass(n, 0, GREEDY) for n in (1, 2, 4, 8)], 50)
        left = []
        for free in (70, 60, 40 if number else 60):
            here.free = free
            left.append(ahead.capture(graphs, graphs, graphs))
        return left, [*graphs.made, len(ahead)]

    with ThreadPoolExecutor(2) as threads:
        for left, made in threads.map(rank, range(2)):
            assert left == [3, 2, GIVEN_UP]
            assert made == [(1, GREEDY, False), (2, GREEDY, False), 0]


def test_graphs_leave_half_of_the_spare_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    device_with(monkeypatch, lambda: 1200, 10000)
    assert least_free(0.9, 1.0) == 700
    assert least_free(0.9, 0.5) == 500, "whatever is free while others load"


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[OfflineEngine]:
    made = OfflineEngine(Config.load({"model": str(tiny_checkpoint(tmp_path)), "device": "cpu", "max_num_seqs": 4}, {}))
    yield made
    made.close()


def worker_of(engine: OfflineEngine) -> Worker:
    worker: Worker = engine.executor._worker  # type: ignore[attr-defined]
    return worker


def test_an_idle_step_captures_and_computes_nothing(engine: OfflineEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not engine.core.can_prepare, "there are no graphs on a CPU"
    worker, graphs = worker_of(engine), Captures()
    device_with(monkeypatch, lambda: 50)
    worker._ahead = Ahead(TPGroup.single(), [Pass(8, 0, GREEDY, wide=True), Pass(0, 64, GREEDY)])
    monkeypatch.setattr(DecodeGraphs, "prepare", lambda self, *key: graphs.prepare(*key))
    monkeypatch.setattr(MixedGraphs, "prepare", lambda self, *key: graphs.prepare(*key))

    def answer() -> list[int]:
        request = engine.request(list(range(20)), SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True))
        return [t for deltas in engine.run([request]) for d in deltas for t in d.token_ids]

    before = answer()
    busy_s = worker.stats().busy_s_total
    for left in (1, 0):
        assert worker.stats().graphs_pending == left + 1
        engine.core.prepare()
        assert worker.stats().graphs_pending == engine.core._graphs_ahead == left
    assert worker.stats().busy_s_total == busy_s
    assert graphs.made == [(8, GREEDY, True), (0, 64, GREEDY, False)]
    assert answer() == before


def test_one_prompt_of_each_shape_that_cudnn_plans_is_tried() -> None:
    assert [p.tokens for p in prompts(16640, 40960)] == [*range(2048, 16641, 512), 16640]
    assert [p.tokens for p in prompts(16640, 3000)] == [2048, 2560, 3000], "none is longer than a sequence may be"
    assert [p.tokens for p in prompts(2048, 40960)] == [2048]
    assert prompts(16640, 2047) == []


@pytest.mark.parametrize("max_length", [2048, 2049, 3000, 8000, 16383, 16640, 40960])
def test_a_prompt_that_is_tried_fits_into_a_block_table(max_length: int) -> None:
    state = SlotState(4, -(-max_length // 64), torch.device("cpu"))
    lengths = [p.tokens for p in prompts(16640, max_length)]
    for tokens in (lengths[0], lengths[-1]):
        chunks = (Chunk(state.tensors.padding_slot, 0, packed([0] * tokens), False),)
        sent = Stager(torch.device("cpu"), 1).send(chunk_parts(chunks))
        assert int(eager_chunks(chunks, sent, state, 64).positions.max()) < max_length


def test_a_prompt_is_one_idle_steps_work(monkeypatch: pytest.MonkeyPatch) -> None:
    device_with(monkeypatch, lambda: 50)
    graphs: Any = Captures({(1, GREEDY, False)})
    monkeypatch.setattr(Captures, "try_prompt", lambda self, tokens: self.made.append(tokens), raising=False)
    ahead = Ahead(TPGroup.single(), [Pass(1, 0, GREEDY), Prompt(2048), Prompt(2560)])
    assert [ahead.capture(graphs, graphs, graphs) for _ in range(2)] == [1, 0]
    assert graphs.made == [2048, 2560]


@pytest.mark.gpu
def test_a_prompt_that_is_tried_leaves_no_trace() -> None:
    options = {"dtype": "bfloat16", "device": "cuda", "max_num_seqs": 4, "num_kv_blocks": 100}
    made = OfflineEngine(Config.load(options, {}))
    worker = worker_of(made)
    state, cache = worker.runner.state.tensors, worker.runner.cache
    worker.graphs.settle()
    before = {k: v.clone() for k, v in vars(state).items() if isinstance(v, torch.Tensor) and k != "stamps"}
    keys = [k[1:].clone() for k in cache.k]
    worker.mixed.try_prompt(2048)
    worker.mixed.try_prompt(1500)
    assert all(torch.equal(v, getattr(state, k)) for k, v in before.items())
    assert all(torch.equal(a, b[1:]) for a, b in zip(keys, cache.k, strict=True)), "block 0 is nobody's"
    made.close()


def test_a_step_says_that_a_graph_was_captured_before_its_answer(
    engine: OfflineEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, decode = worker_of(engine), DecodeGraphs.decode
    outputs, collect = [], worker.collect

    def capturing(self: DecodeGraphs, kind: SampleKind) -> Any:
        self.num_captured += self.num_captured == 0
        return decode(self, kind)

    monkeypatch.setattr(DecodeGraphs, "decode", capturing)
    monkeypatch.setattr(worker, "ready", lambda: False)  # as on a GPU: a step is launched before the last one is over
    monkeypatch.setattr(worker, "collect", lambda: outputs.append(collect()) or outputs[-1])  # type: ignore[func-returns-value]
    request = engine.request([1, 2, 3], SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True))
    list(engine.run([request]))
    assert [output.captured for output in outputs] == [True, True, False, False], "one waited for the next one's launch"


class Graph:
    """Stands for a CUDAGraph."""


def test_no_graph_outlives_its_group(engine: OfflineEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = worker_of(engine)
    device_with(monkeypatch, lambda: 50)
    worker._ahead = Ahead(TPGroup.single(), [Pass(1, 0, GREEDY), Pass(0, 64, GREEDY), Pass(2, 0, GREEDY)])
    monkeypatch.setattr(DecodeGraphs, "_capture", lambda self, *key: (Graph(), None))
    monkeypatch.setattr(MixedGraphs, "_capture", lambda self, *key: (Graph(), None))
    engine.core.prepare()
    engine.core.prepare()
    assert worker.stats().graphs_pending == 1
    (first,), (second,) = worker.graphs._graphs.values(), worker.mixed._graphs.values()
    graphs = [weakref.ref(first[0]), weakref.ref(second[0])]
    del first, second
    holders = [weakref.ref(worker.graphs), weakref.ref(worker.mixed)]
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        worker.leave()
        assert [r() for r in (*graphs, *holders)] == [None] * 4
    finally:
        gc.enable()
        gc.unfreeze()
    worker.rejoined()
    assert worker.stats().graphs_pending == 3, "the next group's graphs are captured anew"


def test_what_waits_for_the_device_or_goes_on_to_a_collective_ends_when_called_off() -> None:
    group = TPGroup.single()
    x = torch.ones(2)
    assert group.all_reduce(x) is x
    group.wait_until(iter([False, True]).__next__)
    looked, ended = threading.Event(), []

    def never() -> bool:
        looked.set()
        return False

    def wait() -> None:
        try:
            group.wait_until(never)
        except ConnectionError as error:
            ended.append(str(error))

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    assert looked.wait(30) and not ended
    group.called_off = True
    thread.join(30)
    assert ended == ["rank 0 of 1 leaves its group"]
    for collective in (group.all_reduce, group.all_gather):
        with pytest.raises(ConnectionError):
            collective(x)


@pytest.mark.parametrize("hung", [False, True])
def test_a_rank_leaves_while_it_captures(engine: OfflineEngine, hung: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its capture waits for a rank that is gone; everything but the device is as in service."""
    worker, looked = worker_of(engine), threading.Event()
    device_with(monkeypatch, lambda: 50)
    worker._ahead = Ahead(worker._group, [Pass(1, 0, GREEDY)])

    def never() -> bool:
        looked.set()
        return False

    monkeypatch.setattr(DecodeGraphs, "prepare", lambda self, *key: self._group.wait_until(never))
    monkeypatch.setattr(worker, "_device", torch.device("cuda"))  # from here on: on a CPU nobody is called off
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    ended: list[str] = []

    def serve() -> None:
        try:
            engine.core.prepare()
        except ConnectionError as error:
            ended.append(str(error))

    process = RankProcess({"model": str(engine.folder), "device": "cpu"}, 0)
    process._worker, process._steps = worker, threading.Thread(target=serve, daemon=True)
    process._steps.start()
    assert looked.wait(30)
    assert process.leave(30.0, hung)
    assert ended == ["rank 0 of 1 leaves its group"]
    monkeypatch.undo()
    worker.rejoined()
    engine.core.restart(0, engine.core.capacity)
    request = engine.request([1, 2, 3], SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True))
    assert sum(len(d.token_ids) for deltas in engine.run([request]) for d in deltas) == 4


@pytest.mark.parametrize("hung", [False, True])
def test_a_rank_that_cannot_leave_says_where_it_is(hung: bool, capfd: pytest.CaptureFixture[str]) -> None:
    process, begun, end = RankProcess({"device": "cpu"}, 0), threading.Event(), threading.Event()

    def a_step_that_does_not_end() -> None:
        begun.set()
        end.wait(60)

    process._steps = threading.Thread(target=a_step_that_does_not_end, daemon=True)
    process._steps.start()
    assert begun.wait(30)
    assert not process.leave(0.1, hung)
    assert "in a_step_that_does_not_end (test_ahead.py" in capfd.readouterr().err
    end.set()


@pytest.mark.gpu
def test_graphs_captured_ahead_answer_as_those_captured_when_needed() -> None:
    options = {"dtype": "float32", "device": "cuda", "max_batched_tokens": 70, "max_num_seqs": 8}

    def answers(ahead: bool) -> list[list[int]]:
        engine = OfflineEngine(Config.load(options, {}))
        worker = worker_of(engine)
        passes, longest = engine.capacity.graphs_ahead, engine.capacity.max_model_len
        assert passes == worker.stats().graphs_pending
        usual = planned(8, 70, longest)
        assert passes == len(usual) + len(wide_variants(usual, longest, worker.runner.has_wide))
        while ahead and engine.core.can_prepare:
            engine.core.prepare()
        captured = worker.graphs.num_captured
        assert captured == (passes if ahead else 0)
        found: list[list[int]] = []
        for kind in ({"temperature": 0.0}, {"temperature": 0.7, "top_k": 20, "seed": 3}):
            params = SamplingParams(**kind, max_tokens=30)  # type: ignore[arg-type]
            requests = [engine.request(list(range(3, 3 + n)), params) for n in (5, 17, 60, 100, 250, 8)]
            tokens: dict[str, list[int]] = {r.id: [] for r in requests}
            for deltas in engine.run(requests):
                for delta in deltas:
                    tokens[delta.id] += delta.token_ids
            found += tokens.values()
        assert not ahead or worker.graphs.num_captured == captured, "a step needed a graph that was not planned"
        engine.close()
        return found

    assert answers(True) == answers(False)


@pytest.mark.gpu
def test_graphs_are_gone_when_a_rank_has_left_and_are_captured_anew() -> None:
    engine = OfflineEngine(Config.load({"device": "cuda", "max_batched_tokens": 70, "max_num_seqs": 2}, {}))
    worker = worker_of(engine)
    engine.core.prepare()
    engine.core.prepare()
    graphs = [weakref.ref(graph) for graph, _ in worker.graphs._graphs.values()]
    assert len(graphs) == 2
    worker.leave()
    assert [r() for r in graphs] == [None, None]
    worker.rejoined()
    engine.core.restart(0, engine.core.capacity)
    while engine.core.can_prepare:
        engine.core.prepare()
    assert worker.graphs.num_captured == engine.capacity.graphs_ahead
    engine.close()
