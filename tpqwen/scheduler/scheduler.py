"""Which rows run in the next step. Pure: no torch, no clock, no I/O; time is an argument.

Up to `depth` steps may be scheduled ahead of their results: every decode row and every sampling chunk in flight is
taken to yield one token, a row of a speculative step all that were drafted for it and one more. Results of rows that
ended, were preempted or moved meanwhile are dropped.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections import deque

import numpy as np

from tpqwen.cache.blocks import BlockPool
from tpqwen.cache.prefix import PrefixCache
from tpqwen.errors import EngineError, RequestError
from tpqwen.request import Delta, Deltas, FinishReason, GenerateRequest
from tpqwen.scheduler.admission import Admission, Verdict
from tpqwen.scheduler.flight import Draft, Flight, Part, Tally
from tpqwen.scheduler.outcome import as_deltas, by_live_row
from tpqwen.scheduler.pace import OUTNUMBER, Room
from tpqwen.scheduler.patience import Patience
from tpqwen.scheduler.rows import NO_ROWS, Longs, Rows, RowSet
from tpqwen.scheduler.sequence import CRASH_BUDGET, Sequence, State, admission, arriving, by_order, check_fits
from tpqwen.scheduler.shares import Shares
from tpqwen.scheduler.speculation import Speculation, take_accepted
from tpqwen.step import Capacity, Chunk, Ints, StepInput, StepOutput, StepStats, ints, packed

AHEAD = 4  # blocks given to a decode row at once while there are plenty


class Scheduler:
    """Owns every Sequence, the block tables and the prefix cache of one group of ranks.

    queue_timeout_s: who waits longer for a first step is given up; 0: nobody. speculation: says which steps draft.
    """

    def __init__(
        self,
        capacity: Capacity,
        *,
        prefix_cache: bool = True,
        epoch: int = 0,
        queue_timeout_s: float = 0.0,
        speculation: Speculation | None = None,
    ) -> None:
        self._prefix_cache = prefix_cache
        self._speculation = speculation
        self._shares = Shares()
        self._patience = Patience(queue_timeout_s)
        self._sequences: dict[str, Sequence] = {}
        self._watched: set[str] = set()  # ids of those with a thinking budget
        self._arrivals = 0
        self._tally = Tally()
        self._begin(epoch, capacity)

    def _begin(self, epoch: int, capacity: Capacity) -> None:
        """An empty cache, no slot taken, nothing in flight."""
        self.capacity = capacity
        self.epoch = epoch
        self.pool = BlockPool(capacity.num_blocks)
        # a decode row always takes one token of the budget, so more rows than that could never run
        num_rows = min(capacity.max_num_seqs, capacity.max_batched_tokens)
        self._rows = Rows(num_rows, capacity.block_size, self.context_limit)
        prefix = PrefixCache(self.pool, capacity.block_size, enabled=self._prefix_cache)
        self._admission = Admission(self.pool, prefix, self._rows)
        self._flights: deque[Flight] = deque()
        self._next_step = 0
        self._prefilling: list[Sequence] = []  # running with tokens still to compute, by order
        self._decoding: list[Sequence] = []  # running with nothing to prefill, may hold some that have left
        self._decode_rows: RowSet | None = None  # of _decoding; None when it changed
        self._quiet = 0  # further steps in which none of them ends, needs a block or becomes long, as far as was looked
        self._sent: Longs | None = None  # decode slots as the ranks know them

    @property
    def context_limit(self) -> int:
        """Tokens, prompt and output, that one sequence may have: the model's limit or what the whole cache holds."""
        return min(self.capacity.max_model_len, self.pool.num_usable * self.capacity.block_size)

    @property
    def has_work(self) -> bool:
        """Whether a request has not ended yet."""
        return bool(self._sequences)

    @property
    def num_in_flight(self) -> int:
        return len(self._flights)

    @property
    def num_waiting(self) -> int:
        return len(self._admission.waiting)

    @property
    def waiting_tokens(self) -> int:
        """Tokens of all waiting sequences, prompt and output."""
        return self._admission.waiting_tokens

    @property
    def num_running(self) -> int:
        return self._rows.num_slots - self._rows.num_free

    @property
    def rows(self) -> Rows:
        """What holds the slots."""
        return self._rows

    def add(self, request: GenerateRequest, now: float) -> Delta | None:
        """Queue a request; output_ids it brings along count as produced. Returns a delta if it has ended already, or
        if its reasoning has to be closed before it goes on.

        Raises RequestError when it can never run: context_length_exceeded, or an id that is in use.
        """
        if request.id in self._sequences:
            raise RequestError(f"request id {request.id!r} is in use", param="id", code="duplicate_id")
        check_fits(request, self.context_limit)
        self._arrivals += 1
        order = (request.priority, self._shares.tag(request), self._arrivals)
        sequence = arriving(request, order, now, self.context_limit)
        if delta := sequence.ended_before() or sequence.over_budget():
            self._shares.ended(request, 0)
            return delta
        self._sequences[request.id] = sequence
        closing = None
        if sequence.watch is not None:
            self._watched.add(request.id)
            closing = self._closed(sequence) if sequence.watch.due else None
        if closing is None or closing.finish_reason is None:
            self._admission.push(sequence)
            self._patience.watch(sequence)
        return closing

    def expire(self, now: float) -> list[Delta]:
        """End those that have waited too long for a first step; their error deltas."""
        text = f"no step was free for this request within {self._patience.timeout_s:g} s"
        return [self._end(s, FinishReason.ERROR, text, "queue_timeout") for s in self._patience.lost(now)]

    def abort(self, request_id: str) -> Delta | None:
        """End a request in whatever state it is; its terminal delta, or None if there is no such request (any more)."""
        sequence = self._sequences.get(request_id)
        return self._end(sequence, FinishReason.ABORT) if sequence else None

    def fail_all(self, message: str, code: str) -> list[Delta]:
        """End every request with an error: the ranks are lost for good."""
        return [self._end(s, FinishReason.ERROR, message, code) for s in list(self._sequences.values())]

    def reset(self, epoch: int, capacity: Capacity) -> list[Delta]:
        """The ranks start anew and know nothing: all that ran is queued again in its old order and will be recomputed.

        Returns error deltas of those that no longer fit into the new capacity or ran in CRASH_BUDGET crashes. One that
        ran in ALONE_AFTER crashes goes on alone.
        """
        self._rows.up_to_date()
        sequences = sorted(self._sequences.values(), key=by_order)
        self._begin(epoch, capacity)
        deltas = []
        for s in sequences:
            s.resumed += s.state is State.RUNNING
            s.slot, s.blocks, s.digests, s.num_registered, s.waits_for = -1, [], [], 0, None
            if s.request.max_tokens:
                s.max_output = min(s.request.max_tokens, self.context_limit - s.num_prompt)
            self._admission.push(s)
            if s.resumed >= CRASH_BUDGET:
                deltas.append(self._end(s, FinishReason.ERROR, s.crash_text, "crash_budget"))
            elif s.num_output >= s.max_output or s.num_tokens > self.context_limit:
                text = f"{s.num_tokens} tokens no longer fit: after the restart the context holds {self.context_limit}"
                deltas.append(self._end(s, FinishReason.ERROR, text, "context_length_exceeded"))
        return deltas

    def schedule(self, now: float, gentle: float | None = None, *, watched: bool = True) -> StepInput | None:
        """The next step, or None when there is nothing to run before an earlier step's result is in.

        Decode rows come first, one token each; prefill chunks share the rest of the budget in order. While streams
        outnumber the prompts to compute, these get about `gentle` work (pace.py). watched: each token is waited for.
        """
        if self._drafts_may_free_blocks():
            return None
        draft, measures = Draft(), False
        preempted = self._grow(draft)
        decode = self._current_rows()
        if prompts := len(self._prefilling) + self.num_waiting:
            budget = self.capacity.max_batched_tokens - len(decode)
            if gentle is not None and len(decode) < OUTNUMBER * prompts:
                gentle = None
            measures = gentle == 0.0  # a step of decode rows alone is wanted, to see what it takes
            waiting = [] if preempted else self._admission.candidates()
            crowd = 0 if watched else sum(s.num_tokens for s in waiting)
            self._prefill(draft, Room(budget, gentle, self.capacity, crowd), waiting, now)
        if not len(decode) and not draft.chunks:
            return None
        return self._commit(draft, decode, 0 if draft.chunks or measures else self._drafts(draft, decode))

    def idle_step(self) -> StepInput:
        """A step without rows, when nothing has work or is in flight."""
        return self._commit(Draft(), NO_ROWS)

    def update(self, output: StepOutput) -> Deltas:
        """Take in the result of the oldest step in flight. Late results of an earlier epoch are dropped.

        Raises EngineError when the result is not the one expected.
        """
        if output.epoch != self.epoch:
            return Deltas()
        flight = self._flights[0] if self._flights else None
        tokens, counts = ints(output.tokens), ints(output.counts)
        num_rows = len(counts) if flight and flight.speculate else len(tokens)
        if flight is None or flight.step != output.step or len(flight.rows) != num_rows:
            wanted = f"step {flight.step} with {len(flight.rows)} rows" if flight else "no step"
            raise EngineError(f"got step {output.step} with {num_rows} rows, expected {wanted}")
        self._flights.popleft()
        self._tally.flight = flight
        scores = dict(output.prompt_logprobs)  # chunks come in order, so theirs follow those known
        for index, part in enumerate(flight.parts):
            if self._rows.generation[part.slot] == part.generation:
                self._admission.settle(part.sequence, part.end)
                part.sequence.prompt_scores += scores.get(index, ())
        live = self._rows.live(flight.rows) if output.bad_rows else ()
        bad = self._end_bad([flight.rows.sequences[i] for i in output.bad_rows if live[i]])
        deltas = self._accept(flight, tokens, counts) if flight.speculate else self._append(flight, tokens, output)
        deltas.others[:0] = bad
        return deltas

    def step_stats(self, duration_s: float, busy_s: float, idle_s: float | None, host_s: float) -> StepStats:
        """Of the step updated last. Counts of events are since the last call."""
        tally, self._tally = self._tally, Tally()
        times = (duration_s, busy_s, idle_s, host_s)
        return tally.stats(self.pool, (self.num_running, self.num_waiting), times)

    def check(self) -> None:
        """Raise EngineError unless every invariant holds. For tests, and for the engine when it is idle."""
        running, waiting = self._rows.running, self._admission.waiting
        self.pool.check(s.blocks for s in running)
        for s in running:
            self._rows.check(s)
        if waiting != sorted(waiting, key=by_order) or any(s.blocks or s.slot >= 0 for s in waiting):
            raise EngineError("the queue is out of order, or a waiting request holds blocks")
        if {*running, *waiting} != {*self._sequences.values()} or len(running) + len(waiting) != len(self._sequences):
            raise EngineError(f"{len(running)} running + {len(waiting)} waiting of {len(self._sequences)} requests")

    def _current_rows(self) -> RowSet:
        if self._decode_rows is None:
            left, drafted = self._rows.left.tolist(), self._rows.drafted.tolist()
            self._decoding = [s for s in self._decoding if s.slot >= 0 and (left[s.slot] > 0 or drafted[s.slot])]
            self._decode_rows = self._rows.row_set([s for s in self._decoding if left[s.slot] > 0])
            self._quiet = 0
        return self._decode_rows

    def _drafts_may_free_blocks(self) -> bool:
        """Whether rows need more blocks than there are if all drafts in flight are accepted: their result will tell."""
        if self._speculation is None or self._quiet or not self._rows.drafted.any():
            return False
        return len(self._rows.needy(self._current_rows(), ahead=False)) > self.pool.num_available

    def _grow(self, draft: Draft) -> bool:
        """A block for every decode row whose next position has none, by_order. True if some were preempted."""
        decode, rows = self._current_rows(), self._rows
        if self._quiet:
            return False
        before = self._tally.preemptions
        plenty = self.pool.num_available >= 2 * AHEAD * len(decode)
        for sequence in rows.needy(decode, ahead=plenty):
            if sequence.slot >= 0 and self._make_room(sequence):
                missing = int(rows.computed[sequence.slot] + rows.left[sequence.slot] - rows.capacity[sequence.slot])
                count = min(AHEAD, -(-missing // rows.block_size)) if plenty else 1
                draft.blocks += self._admission.give(sequence, count)
        return self._tally.preemptions > before

    def _make_room(self, sequence: Sequence) -> bool:
        """See that one block is available, by preempting the last in order; False if that was the sequence itself.

        The first in order is never preempted, and the whole cache holds any one sequence (`context_limit`): it always
        gets on, ends, and then the next is first. So there is no livelock.
        """
        if not self.pool.num_available:
            self._admission.take_back(self._current_rows().sequences)
        while not self.pool.num_available:
            victim = max(self._rows.running, key=by_order)
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence, *, trusted: bool = True) -> None:
        self._leave(sequence, trusted=trusted)
        sequence.preemptions += 1
        self._tally.preemptions += 1
        self._admission.push(sequence)

    def _prefill(self, draft: Draft, room: Room, waiting: list[Sequence], now: float) -> None:
        """Chunks by_order (priority, share, arrival): having begun earlier gives no right of way."""
        full = False
        for sequence in heapq.merge(self._prefilling[:], waiting, key=by_order):
            if room.is_full:
                break
            if sequence.slot < 0:
                if room.is_scrap(sequence.num_tokens):
                    break
                verdict = Verdict.FULL if full else self._admission.enter(sequence)
                full = verdict is Verdict.FULL
                if verdict is not Verdict.ENTERED:
                    continue
                self._announce(sequence, draft, now)
            start = int(self._rows.computed[sequence.slot])
            room.take(start, self._chunk(sequence, room.tokens(start, sequence.num_prefill - start), draft))

    def _announce(self, sequence: Sequence, draft: Draft, now: float) -> None:
        """Tell the ranks of a sequence that has just entered."""
        drafting = self._speculation is not None and sequence.row_params.can_speculate
        draft.admits.append(admission(sequence, sequence.num_chunked if drafting else 0))
        for index, block in enumerate(sequence.blocks):
            draft.blocks += (sequence.slot, index, block)
        insort(self._prefilling, sequence, key=by_order)
        self._shares.entered(sequence.order[1])
        if sequence.queue_s is None:
            sequence.queue_s = now - sequence.arrived_at
            sequence.cached_tokens = min(sequence.num_chunked, sequence.num_prompt)
            self._tally.prefix_queried += sequence.num_prompt
            self._tally.prefix_hit += sequence.cached_tokens

    def _chunk(self, sequence: Sequence, budget: int, draft: Draft) -> int:
        """The sequence's next chunk, at most `budget` tokens; returns how many."""
        slot, rows = sequence.slot, self._rows
        start = int(rows.computed[slot])
        end = min(start + budget, sequence.num_prefill)
        sample = end == sequence.num_prefill
        ids, targets = sequence.tokens[start:end].tobytes(), sequence.targets(start, end)
        draft.chunks.append(Chunk(slot, start, ids, sample, targets))
        draft.parts.append(Part(sequence, slot, int(rows.generation[slot]), end))
        rows.computed[slot] = end
        if sample:
            rows.left[slot] -= 1
            draft.sampled.append(sequence)
            self._prefilling.remove(sequence)
        return end - start

    def _drafts(self, draft: Draft, decode: RowSet) -> int:
        """How many tokens a step of these decode rows alone drafts for each. Nobody is preempted for drafts."""
        speculation, rows = self._speculation, self._rows
        if speculation is None or not speculation.fits(len(decode), self.capacity.max_batched_tokens):
            return 0
        missing = rows.missing_blocks(decode, 1 + speculation.count)
        if missing is None or missing.sum() > self.pool.num_available or not speculation.wanted(len(decode)):
            return 0
        for i in np.flatnonzero(missing).tolist():
            draft.blocks += self._admission.give(decode.sequences[i], int(missing[i]))
        return speculation.count

    def _commit(self, draft: Draft, decode: RowSet, speculate: int = 0) -> StepInput:
        """Account for the step as if it had run, and remember what to do with its result."""
        rows, slots = self._rows, decode.slots
        rows.schedule(decode, speculate)
        self._quiet = self._quiet - 1 if self._quiet and not speculate else rows.quiet(decode)
        if draft.sampled or self._quiet < 0:
            self._decoding += draft.sampled
            self._decode_rows, self._quiet = None, 0
        unchanged = self._sent is not None and (self._sent is slots or np.array_equal(self._sent, slots))
        self._sent = slots
        all_rows = decode.joined(rows.row_set(draft.sampled)) if draft.sampled else decode
        step = StepInput(
            epoch=self.epoch,
            step=self._next_step,
            admits=tuple(draft.admits),
            blocks=packed(draft.blocks) if draft.blocks else b"",
            chunks=tuple(draft.chunks),
            decode=None if unchanged else packed(slots),
            wide=rows.long and len(decode) > 0,
            speculate=speculate,
        )
        counts = len(decode), draft.parts, step.num_chunk_tokens, speculate
        self._flights.append(Flight(step.step, all_rows, rows.releases, *counts))
        self._next_step += 1
        return step

    def _append(self, flight: Flight, tokens: Ints, output: StepOutput) -> Deltas:
        """Append each live row's token to its sequence; their deltas, with those that end ended."""
        rows, num_decode, live = flight.rows, flight.num_decode, None
        if self._rows.releases != flight.releases:
            live = self._rows.live(rows)
            rows, tokens, num_decode = rows.picked(live), tokens[live], int(live[:num_decode].sum())
        index = self._rows.append(rows, tokens)
        stop, full = self._rows.ended(rows, tokens, index)
        logprobs, pooled = by_live_row(output.logprobs, live), by_live_row(output.pooled, live)
        own = stop | full
        own[num_decode:] = True
        for row in (*logprobs, *pooled):
            own[row] = True
        deltas, others = as_deltas(rows, tokens, index, own)
        self._tally.output_tokens += len(rows)
        for row, delta in others.items():
            sequence = rows.sequences[row]
            delta.logprobs = [logprobs[row]] if row in logprobs else None
            delta.pooled = pooled.get(row)
            if row >= num_decode:
                sequence.describe(delta)
                self._tally.output_tokens -= not delta.token_ids
            if stop[row] or full[row]:
                self._finish(sequence, delta, int(tokens[row]) if stop[row] else None)
        if self._watched:
            deltas.others.extend(self._close_thinking(rows, tokens.tolist()))
        return deltas

    def _accept(self, flight: Flight, tokens: Ints, counts: Ints) -> Deltas:
        """Append what a speculative step brought each live row; their deltas, with those that end ended."""
        deltas = []
        for sequence, delta, ended in take_accepted(self._rows, flight, tokens, counts, self._tally):
            deltas.append(delta)
            if ended:
                self._finish(sequence, delta, delta.stop_id)
            elif sequence.watch is not None and sequence.watch.due:
                deltas.append(self._close(sequence))
        if self._decode_rows is not None and len(self._decoding) != len(self._decode_rows):
            self._decode_rows = None  # some waited for this, and may go on
        return Deltas(others=deltas)

    def _finish(self, sequence: Sequence, delta: Delta, stop_id: int | None) -> None:
        """Its new token ends it. An end token stays in token_ids: the text layer hides it."""
        delta.finish_reason = FinishReason.LENGTH if stop_id is None else FinishReason.STOP
        delta.stop_id = stop_id
        delta.resumed = sequence.resumed
        sequence.state = State.FINISHED
        self._leave(sequence)
        self._forget(sequence)

    def _close_thinking(self, rows: RowSet, tokens: list[int]) -> list[Delta]:
        """Reasoning that has reached its budget is closed by appending the closing tokens as if they had been sampled.

        They are computed like a preempted sequence's: it goes back to its place in the queue, and the prefix cache has
        nearly all of it. What is in flight for it is dropped with its slot.
        """
        deltas = []
        for s, token in zip(rows.sequences, tokens, strict=True):
            if s.watch is None:
                continue
            s.watch.take(token)
            if s.state is State.RUNNING and s.watch.due:
                deltas.append(self._close(s))
        return deltas

    def _close(self, sequence: Sequence) -> Delta:
        self._leave(sequence)  # before its tokens change: what is settled is counted by them
        delta = self._closed(sequence)
        if delta.finish_reason is None:
            self._admission.push(sequence)
        return delta

    def _closed(self, sequence: Sequence) -> Delta:
        """Append the closing tokens; the delta that says so ends the sequence when there is no room for more."""
        index = sequence.num_output
        delta = Delta(id=sequence.request.id, index=index, token_ids=list(sequence.close_thinking()))
        self._tally.output_tokens += len(delta.token_ids)
        if sequence.num_output == sequence.max_output:
            sequence.state, delta.finish_reason = State.FINISHED, FinishReason.LENGTH
            self._forget(sequence)
        return delta

    def _end_bad(self, sequences: list[Sequence]) -> list[Delta]:
        """NaN or Inf in these rows' logits: they end, and nothing that they computed may be found by others.

        Of rows that share blocks the first in order ends. The others, bad or not yet, may only have read what it wrote:
        they are computed again without it.
        """
        deltas = []
        text = "the model produced NaN or Inf for this request"
        for sequence in sorted(sequences, key=by_order):
            if sequence.state is State.RUNNING:
                held = set(sequence.blocks)
                deltas.append(self._end(sequence, FinishReason.ERROR, text, "numerical_error", trusted=False))
                for other in self._rows.running:
                    if not held.isdisjoint(other.blocks):
                        self._preempt(other, trusted=False)
        return deltas

    def _end(
        self,
        sequence: Sequence,
        reason: FinishReason,
        error: str | None = None,
        code: str | None = None,
        *,
        trusted: bool = True,
    ) -> Delta:
        if sequence.state is State.RUNNING:
            self._leave(sequence, trusted=trusted)
        else:
            self._admission.remove(sequence)
        self._forget(sequence)
        return sequence.finish(reason, error=error, code=code)

    def _forget(self, sequence: Sequence) -> None:
        """It has ended: its tenant's share is charged what it took instead of what was expected."""
        del self._sequences[sequence.request.id]
        self._watched.discard(sequence.request.id)
        self._shares.ended(sequence.request, 0 if sequence.queue_s is None else sequence.num_tokens)

    def _leave(self, sequence: Sequence, *, trusted: bool = True) -> None:
        if sequence in self._prefilling:
            self._prefilling.remove(sequence)
        self._admission.leave(sequence, trusted=trusted)
        self._decode_rows = None
