"""EngineCore: the step loop over one group of ranks. Single-threaded: its owner calls `step` while there is work."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from tpqwen.config import ScheduleOptions
from tpqwen.engine.deadlines import Deadlines
from tpqwen.errors import EngineError, Overloaded
from tpqwen.executor.protocol import Executor
from tpqwen.request import Delta, Deltas, GenerateRequest
from tpqwen.scheduler.pace import Pace
from tpqwen.scheduler.scheduler import Scheduler
from tpqwen.scheduler.speculation import Speculation
from tpqwen.step import GIVEN_UP, Capacity, StepInput, StepStats

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one call of `step` brought. stats is None when no step's result came in."""

    deltas: Deltas
    stats: StepStats | None


class EngineCore:
    """All request state of one engine, and its loop: schedule, submit, collect, update.

    When `step` raises (RankDied, EngineError) every request is still there: repair the ranks and call `restart`, which
    queues what ran for recomputation, or `fail`, which ends everything.
    """

    def __init__(
        self,
        executor: Executor,
        capacity: Capacity,
        schedule: ScheduleOptions | None = None,
        prefix_cache: bool = True,
        *,
        epoch: int = 0,
        queue_timeout_s: float = 0.0,
        compiles: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        options = schedule or ScheduleOptions()
        self.executor = executor
        self._speculation = Speculation(options.num_drafts) if options.num_drafts else None
        self.scheduler = Scheduler(
            capacity,
            prefix_cache=prefix_cache,
            epoch=epoch,
            queue_timeout_s=queue_timeout_s,
            speculation=self._speculation,
        )
        self.draining = False
        self.paced = True  # prompts are computed gently beside running streams; not where nobody watches
        self._depth = max(1, min(options.depth, executor.depth))
        self._clock = clock
        self._in_flight: deque[tuple[StepInput, float, float]] = deque()  # with time of submission and seconds allowed
        self._last_collect = clock()
        self._deadlines = Deadlines(compiles=compiles)
        self._pace = Pace(capacity.context_cost)
        self._graphs_ahead = capacity.graphs_ahead  # still to be captured; GIVEN_UP for good once that has failed
        self._deltas: list[Delta] = []  # of requests that ended between steps
        self.on_started: Callable[[list[str]], None] | None = None  # hears who is to be computed, before it happens

    @property
    def capacity(self) -> Capacity:
        return self.scheduler.capacity

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do: requests, deltas not yet handed out, or steps in flight."""
        return bool(self._deltas or self._in_flight) or self.scheduler.has_work

    @property
    def can_prepare(self) -> bool:
        """Whether there is nothing to do for anybody, and something to capture for whoever comes next."""
        return self._graphs_ahead > 0 and not self.has_work and not self.draining

    @property
    def silent_s(self) -> float:
        """Seconds since the oldest step in flight began: how long ranks that are lost now may have been lost."""
        return self._clock() - max(self._in_flight[0][1], self._last_collect) if self._in_flight else 0.0

    @property
    def num_waiting(self) -> int:
        """Requests that hold no slot."""
        return self.scheduler.num_waiting

    @property
    def waiting_tokens(self) -> int:
        """Their tokens."""
        return self.scheduler.waiting_tokens

    def add(self, request: GenerateRequest) -> None:
        """Queue a request. With output_ids it goes on after them. Raises RequestError, Overloaded while draining."""
        if self.draining:
            raise Overloaded("the engine is draining", code="draining", status=503)
        if delta := self.scheduler.add(request, self._clock()):
            self._deltas.append(delta)

    def abort(self, request_id: str) -> None:
        """End a request; its terminal delta comes with the next step. Nothing happens if it has ended already."""
        if delta := self.scheduler.abort(request_id):
            self._deltas.append(delta)

    def drain(self) -> None:
        """Take no new requests; those that are here go on until `has_work` is false."""
        self.draining = True

    def reopen(self) -> None:
        """Take new requests again."""
        self.draining = False

    def step(self) -> StepResult:
        """Submit one more step if it may be, and collect the oldest when the pipeline is full, stuck or ahead of us.

        May return without deltas, so that the caller can take in requests between two submits. Raises RankDied or
        EngineError with all requests intact; no step may follow before `restart`.
        """
        begin = time.perf_counter()
        self._deltas += self.scheduler.expire(self._clock())
        step = None
        if len(self._in_flight) < self._depth:
            gentle = self._pace.limit if self.paced else None
            step = self.scheduler.schedule(self._clock(), gentle, watched=self.paced)
        if step is not None:
            if step.admits and self.on_started is not None:
                self.on_started([self.scheduler.rows.holder(a.slot) for a in step.admits])
            self._in_flight.append((step, self._clock(), self._deadlines.of(step)))
            if _log.isEnabledFor(logging.DEBUG):
                parts = (f"{self.scheduler.rows.holder(c.slot)}:{c.start}+{c.num_tokens}" for c in step.chunks)
                _log.debug("submit step=%d prompts=%s", step.step, ",".join(parts))
            self.executor.submit(step)
        deltas, stats = Deltas(), None
        if self._in_flight and (step is None or len(self._in_flight) == self._depth or self.executor.ready()):
            deltas, stats = self._collect(begin)
        if self._deltas:
            deltas.others[:0] = self.take_deltas()
        return StepResult(deltas, stats)

    def prepare(self) -> None:
        """An idle step: every rank captures one graph ahead. Only when `can_prepare`. Raises as `step` does.

        One that fails is the last of this engine, so that what fails again and again cannot use up the repairs.
        """
        self._graphs_ahead = GIVEN_UP
        step = self.scheduler.idle_step()
        self._in_flight.append((step, self._clock(), self._deadlines.of_idle(step)))
        try:
            self.executor.submit(step)
            output = self.executor.collect(self._in_flight[0][2])
            if output.error:
                raise EngineError(output.error)
        except EngineError as error:
            _log.warning("a graph could not be captured ahead; from now on they are captured when needed: %s", error)
            raise
        self._in_flight.clear()
        self.scheduler.update(output)
        self._last_collect = self._clock()
        self._graphs_ahead = output.graphs_left

    def restart(self, epoch: int, capacity: Capacity, executor: Executor | None = None) -> None:
        """The ranks are new: forget steps in flight and all cached blocks, recompute what ran. Streams go on.

        executor: the way to the new group, where the old one does not lead there.
        """
        self.executor = executor or self.executor
        self._in_flight.clear()
        if self._graphs_ahead != GIVEN_UP:
            self._graphs_ahead = capacity.graphs_ahead
        self._deadlines.restart()
        self._last_collect = self._clock()
        self._deltas += self.scheduler.reset(epoch, capacity)

    def fail(self, error: EngineError) -> None:
        """The ranks cannot be repaired: every request ends with this error, in the next result."""
        self._in_flight.clear()
        self._deltas += self.scheduler.fail_all(str(error), error.code)

    def take_deltas(self) -> list[Delta]:
        """Deltas made outside of `step`, for a caller that will not step again."""
        deltas, self._deltas = self._deltas, []
        return deltas

    def _collect(self, begin: float) -> tuple[Deltas, StepStats | None]:
        """The oldest step's result. begin: when this thread began to work for the step, on perf_counter's clock."""
        step, submitted, _ = self._in_flight[0]
        asked = time.perf_counter()
        # ranks launch a step before they answer the one before it, and to launch it may be to compile it
        output = self.executor.collect(max(allowed_s for _, _, allowed_s in self._in_flight))
        waited_s = time.perf_counter() - asked
        if output.error:
            raise EngineError(output.error)
        if output.epoch != step.epoch:  # a late result of ranks that are gone
            return Deltas(), None
        self._in_flight.popleft()
        now = self._clock()
        duration_s = now - max(submitted, self._last_collect)  # it began when the one before it ended
        self._last_collect = now
        deltas = self.scheduler.update(output)
        if _log.isEnabledFor(logging.DEBUG):
            parts = (f"{d.id}:{d.index}+{len(d.token_ids)}" for d in deltas)
            _log.debug("collect step=%d ms=%.2f outputs=%s", step.step, duration_s * 1e3, ",".join(parts))
        host_s = time.perf_counter() - begin - waited_s
        stats = self.scheduler.step_stats(duration_s, output.busy_s, output.idle_s, host_s)
        self._deadlines.observe(step, duration_s, captured=output.captured)
        if not output.captured:
            self._learn(step, stats)
        return deltas, stats

    def _learn(self, step: StepInput, stats: StepStats) -> None:
        """What the step says about the next ones. A speculative one is no measure of what a decode step takes."""
        if self._speculation is not None:
            self._speculation.observe(step, stats)
        if not step.speculate:
            self._pace.observe(step, stats)
