"""Random workloads against a naive model: invariants after each step, outputs a pure function of the history."""

from __future__ import annotations

from collections import deque
from itertools import pairwise
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import fakes
from tests.fakes import FakeExecutor, expected_tokens, tiny_capacity
from tpqwen.request import Delta, FinishReason, GenerateRequest, SamplingParams
from tpqwen.scheduler import rows
from tpqwen.scheduler.scheduler import Scheduler
from tpqwen.scheduler.sequence import ALONE_AFTER, CRASH_BUDGET
from tpqwen.scheduler.speculation import Speculation
from tpqwen.step import Capacity, StepInput

FIXED = settings(
    max_examples=60, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(autouse=True)
def long_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some rows of these small sizes count as long: the executor sees to it that steps say so."""
    for module in (rows, fakes):
        monkeypatch.setattr(module, "LONG_ROW", 50)


class Sometimes(Speculation):
    """Wants to in two of three steps, whatever they cost."""

    def wanted(self, num_rows: int) -> bool:
        self._since_trial += 1
        return self._since_trial % 3 > 0


class Run:
    """A scheduler over a FakeExecutor, with a record of all that was said about each request."""

    def __init__(self, capacity: Capacity, *, depth: int = 2, prefix_cache: bool = True, drafts: int = 0) -> None:
        self.capacity = capacity
        self.executor = FakeExecutor(capacity, depth=depth)
        speculation = Sometimes(drafts) if drafts else None
        self.scheduler = Scheduler(capacity, prefix_cache=prefix_cache, speculation=speculation)
        self.depth = depth
        self.now = 0.0
        self.requests: dict[str, GenerateRequest] = {}
        self.tokens: dict[str, list[int]] = {}
        self.ended: dict[str, Delta] = {}
        self.decode: list[int] = []
        self.entered: list[str] = []  # in the order of first admission
        self.preemptions = 0
        self.crashes: dict[str, int] = {}  # in which the request was running

    def add(self, request: GenerateRequest) -> None:
        self.requests[request.id] = request
        self.tokens[request.id] = list(request.output_ids)
        if delta := self.scheduler.add(request, self.now):
            self._take([delta])
        self.scheduler.check()

    def abort(self, name: str) -> None:
        delta = self.scheduler.abort(name)
        assert (delta is None) == (name in self.ended)
        if delta:
            assert delta.finish_reason is FinishReason.ABORT
            self._take([delta])
        self.scheduler.check()

    def schedule(self) -> bool:
        """Submit one step if the pipeline has room; whether it did."""
        if self.scheduler.num_in_flight >= self.depth:
            return False
        self.now += 1
        expected = {s.slot for s in self.scheduler._rows.running if self._must_decode(s.slot)}
        step = self.scheduler.schedule(self.now, (None, 3, 1)[int(self.now) % 3])
        self.scheduler.check()
        if step is None:
            waits = self.scheduler.num_in_flight and self.scheduler.rows.drafted.any()  # for their blocks
            left = [slot for slot in expected if self.scheduler._rows.sequences[slot] is not None]
            assert waits or not left, "a decode row was left out"
            return False
        self._check_step(step, expected)
        self._check_company()
        self.executor.submit(step)
        return True

    def collect(self) -> None:
        self._take(list(self.scheduler.update(self.executor.collect(1.0))))
        self.preemptions += self.scheduler.step_stats(0.0, 0.0, None, 0.0).preemptions
        assert (self.scheduler.rows.drafted <= self.scheduler.num_in_flight).all()
        self.scheduler.check()

    def restart(self) -> None:
        epoch = self.scheduler.epoch + 1
        self.executor.restart(epoch)
        self.decode = []
        for name, sequence in self.scheduler._sequences.items():
            self.crashes[name] = self.crashes.get(name, 0) + (sequence.slot >= 0)
        deltas = self.scheduler.reset(epoch, self.capacity)
        over = {n for n, count in self.crashes.items() if count >= CRASH_BUDGET and n not in self.ended}
        assert {d.id for d in deltas} == over and all(d.error_code == "crash_budget" for d in deltas)
        self._take(deltas)
        self.scheduler.check()

    def finish(self, steps: int = 20_000) -> None:
        """Run until everything has ended."""
        while self.scheduler.has_work or self.scheduler.num_in_flight:
            if not self.schedule() or self.scheduler.num_in_flight == self.depth:
                assert self.scheduler.num_in_flight, "work, but nothing runs"
                self.collect()
            steps -= 1
            assert steps, "no end in sight"

    def check_ended(self) -> None:
        """Every request ended exactly once, with exactly the tokens it had to have; no block is held."""
        assert self.ended.keys() == self.requests.keys()
        assert self.scheduler.pool.num_used == 0 and self.scheduler.num_waiting == 0
        for name, request in self.requests.items():
            delta, tokens = self.ended[name], self.tokens[name]
            room = self.scheduler.context_limit - len(request.prompt_ids)
            expected = expected_tokens(request, min(request.max_tokens, room))
            if delta.finish_reason is FinishReason.ABORT or delta.error_code == "crash_budget":
                assert tokens == expected[: len(tokens)]
                continue
            assert tokens == expected, name
            stopped = tokens[-1] in request.end_ids and len(tokens) > request.params.min_tokens
            assert delta.finish_reason is (FinishReason.STOP if stopped else FinishReason.LENGTH)
            assert delta.stop_id == (tokens[-1] if stopped else None)

    def _must_decode(self, slot: int) -> bool:
        rows = self.scheduler._rows
        sequence = rows.sequences[slot]
        return sequence is not None and rows.computed[slot] >= sequence.num_prefill and rows.left[slot] > 0

    def _check_step(self, step: StepInput, expected: set[int]) -> None:
        """Decode rows never starve: every one that could is in the step, unless it was preempted for another."""
        decode = self.executor.decode if step.decode is None else list(memoryview(step.decode).cast("i"))
        still = {slot for slot in expected if self.scheduler._rows.sequences[slot] is not None}
        assert still <= set(decode) <= expected
        for admit in step.admits:
            sequence = self.scheduler._rows.sequences[admit.slot]
            assert sequence is not None
            if sequence.request.id not in self.entered:
                self.entered.append(sequence.request.id)

    def _check_company(self) -> None:
        """Who ran in ALONE_AFTER crashes is the only one that runs."""
        running = self.scheduler._rows.running
        suspects = [s for s in running if self.crashes.get(s.request.id, 0) >= ALONE_AFTER]
        assert not suspects or running == suspects[:1]

    def _take(self, deltas: list[Delta]) -> None:
        for d in deltas:
            assert d.id not in self.ended, "a delta after the end"
            assert d.index == len(self.tokens[d.id]), "a token lost or repeated"
            self.tokens[d.id] += d.token_ids
            if d.finish_reason:
                self.ended[d.id] = d


def random_request(random: Random, name: str, *, tenants: tuple[str, ...] = ("",)) -> GenerateRequest:
    """Prompts of a family share their start; some end by an end token, some need their history."""
    family, length = random.randrange(3), random.randint(1, 60)
    shared = random.randint(0, length)
    prompt = [family * 7 + i % 5 for i in range(shared)] + [random.randrange(1000) for _ in range(length - shared)]
    penalty = random.choice([0.0, 0.0, 0.5])
    return GenerateRequest(
        id=name,
        prompt_ids=prompt,
        params=SamplingParams(min_tokens=random.choice([0, 0, 5]), presence_penalty=penalty),
        max_tokens=random.choice([1, 2, 5, 20, 60]),
        seed=random.randrange(100),
        end_ids=tuple(range(random.choice([0, 2, 20]))),
        priority=random.choice([0, 0, 0, -1, 1]),
        cache_salt=random.choice(["", "", "other"]),
        tenant=random.choice(tenants),
        output_ids=[random.randrange(500, 1000) for _ in range(random.choice([0, 0, 0, 3]))],
    )


def random_capacity(random: Random) -> Capacity:
    return tiny_capacity(
        num_blocks=random.choice([18, 20, 33, 65, 200]),
        max_num_seqs=random.choice([1, 2, 5, 8]),
        max_batched_tokens=random.choice([1, 3, 16, 64]),
        max_model_len=random.choice([64, 90]),
    )


def random_event(run: Run, random: Random) -> None:
    """One of: a request arrives, one is aborted, a step is submitted or collected, the ranks are lost."""
    dice = random.random()
    if dice < 0.25:
        run.add(random_request(random, f"r{len(run.requests)}", tenants=("", "a", "b")))
    elif dice < 0.29 and run.requests:
        run.abort(random.choice(list(run.requests)))
    elif dice < 0.295:
        run.restart()
    elif dice < 0.65 or not run.scheduler.num_in_flight:
        run.schedule()
    else:
        run.collect()


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(10))
def test_random_workloads_change_nothing_in_the_outputs(seed: int, depth: int) -> None:
    random = Random(1000 * depth + seed)
    run = Run(random_capacity(random), depth=depth, prefix_cache=random.random() < 0.8)
    for _ in range(200):
        random_event(run, random)
    run.finish()
    run.check_ended()


@pytest.mark.parametrize("drafts", [1, 3, 7])
@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("seed", range(8))
def test_random_workloads_with_speculation_change_nothing_either(seed: int, depth: int, drafts: int) -> None:
    random = Random(1000 * depth + 10 * drafts + seed)
    run = Run(random_capacity(random), depth=depth, prefix_cache=random.random() < 0.8, drafts=drafts)
    for _ in range(200):
        random_event(run, random)
    run.finish()
    run.check_ended()


def test_steps_with_and_without_long_rows_alternate() -> None:
    random = Random(7)
    run = Run(random_capacity(random))
    for _ in range(300):
        random_event(run, random)
    run.finish()
    wide = [step.wide for step in run.executor.steps]
    assert 3 <= sum(a != b for a, b in pairwise(wide)) <= len(run.requests)
    assert 0.1 < sum(wide) / len(wide) < 0.9


@FIXED
@given(data=st.data())
def test_any_order_of_events_keeps_the_invariants(data: st.DataObject) -> None:
    sizes = st.fixed_dictionaries(
        {"num_blocks": st.integers(3, 40), "max_num_seqs": st.integers(1, 6), "max_batched_tokens": st.integers(1, 24)}
    )
    capacity = tiny_capacity(**data.draw(sizes))
    run = Run(capacity, depth=data.draw(st.integers(1, 4)), drafts=data.draw(st.integers(0, 7)))
    limit = run.scheduler.context_limit
    for event in data.draw(st.lists(st.sampled_from("aaasssscccxr"), max_size=60)):
        if event == "a":
            prompt = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=min(limit - 1, 24)))
            request = GenerateRequest(
                id=str(len(run.requests)),
                prompt_ids=prompt,
                params=SamplingParams(),
                max_tokens=data.draw(st.integers(1, 30)),
                seed=0,
                end_ids=(7,),
                priority=data.draw(st.integers(0, 1)),
                tenant=data.draw(st.sampled_from("ab")),
            )
            run.add(request)
        elif event == "s":
            run.schedule()
        elif event == "c" and run.scheduler.num_in_flight:
            run.collect()
        elif event == "x" and run.requests:
            run.abort(data.draw(st.sampled_from(sorted(run.requests))))
        elif event == "r":
            run.restart()
    run.finish()
    run.check_ended()


def test_same_operations_give_the_same_decisions() -> None:
    def steps(seed: int) -> list[StepInput]:
        random = Random(seed)
        run = Run(random_capacity(random), depth=2)
        for _ in range(200):
            random_event(run, random)
        run.finish()
        return run.executor.steps

    assert steps(5) == steps(5)


def test_ten_thousand_aborts_in_every_state_leave_no_block_behind() -> None:
    random = Random(4)
    run = Run(tiny_capacity(num_blocks=60, max_num_seqs=6, max_batched_tokens=24), depth=2)
    aborted = 0
    open_names: deque[str] = deque()
    check, run.scheduler.check = run.scheduler.check, lambda: None  # type: ignore[method-assign]
    while aborted < 10_000:
        while len(open_names) < 12:
            open_names.append(f"r{len(run.requests)}")
            run.add(random_request(random, open_names[-1]))
        for _ in range(random.randrange(4)):
            if not run.schedule() and run.scheduler.num_in_flight:
                run.collect()
        for _ in range(random.randrange(8)):
            name = open_names[random.randrange(len(open_names))]
            open_names.remove(name)
            aborted += name not in run.ended
            run.abort(name)
        if aborted % 50 == 0:
            check()
    run.finish()
    check()
    assert run.scheduler.pool.num_used == 0
    assert run.ended.keys() == run.requests.keys()


def worst_preemptions(run: Run, count: int, prompt: int, output: int) -> int:
    """Serve `count` requests to their ends; how often the unluckiest was preempted."""
    for i in range(count):
        ids = [100 * i + j for j in range(prompt)]
        run.add(GenerateRequest(id=str(i), prompt_ids=ids, params=SamplingParams(), max_tokens=output, seed=i))
    worst = 0
    while run.scheduler.has_work or run.scheduler.num_in_flight:
        if not run.schedule() or run.scheduler.num_in_flight == run.depth:
            run.collect()
        worst = max([worst, *(s.preemptions for s in run.scheduler._sequences.values())])
    run.check_ended()
    assert run.entered == [str(i) for i in range(count)]
    return worst


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize(("prompt", "output"), [(16, 64), (40, 40), (70, 10), (4, 76)])
def test_a_cache_for_one_request_and_a_fifth_serves_eight_with_few_preemptions(
    prompt: int, output: int, depth: int
) -> None:
    run = Run(tiny_capacity(num_blocks=25, max_batched_tokens=32), depth=depth)  # 24 blocks of 4; one request takes 20
    assert worst_preemptions(run, 8, prompt, output) <= 3


def test_long_answers_in_a_crowded_cache_are_preempted_a_few_times_only() -> None:
    """Without room that grows with each preemption some of these are preempted six times."""
    run = Run(tiny_capacity(num_blocks=100, max_num_seqs=32, max_batched_tokens=64, max_model_len=312), depth=2)
    run.scheduler.check = lambda: None  # type: ignore[method-assign]
    assert worst_preemptions(run, 30, 4, 300) <= 3


@pytest.mark.parametrize("seed", range(5))
def test_first_come_first_served_within_a_priority(seed: int) -> None:
    random = Random(seed)
    run = Run(tiny_capacity(max_num_seqs=3), prefix_cache=False)
    for i in range(25):
        run.add(random_request(random, f"r{i}"))
        run.schedule()
        if run.scheduler.num_in_flight == 2:
            run.collect()
    run.finish()
    run.check_ended()
    for priority in (-1, 0, 1):
        names = [n for n in run.entered if run.requests[n].priority == priority]
        assert names == sorted(names, key=lambda n: int(n[1:]))


@pytest.mark.parametrize("seed", range(5))
def test_first_come_first_served_within_a_tenant(seed: int) -> None:
    random = Random(seed)
    run = Run(tiny_capacity(max_num_seqs=3), prefix_cache=False)
    for i in range(40):
        run.add(random_request(random, f"r{i}", tenants=("a", "b", "c")))
        run.schedule()
        if run.scheduler.num_in_flight == 2:
            run.collect()
    run.finish()
    run.check_ended()
    for group in {(r.tenant, r.priority) for r in run.requests.values()}:
        names = [n for n in run.entered if (run.requests[n].tenant, run.requests[n].priority) == group]
        assert names == sorted(names, key=lambda n: int(n[1:]))
