"""Executor over message channels: one encoded step to all ranks, outputs from rank 0, failures from any. No Ray."""

from __future__ import annotations

import os
import select
import time
from collections import deque
from collections.abc import Collection, Mapping

from tpqwen.errors import RankDied
from tpqwen.executor import processes
from tpqwen.executor.wiring import Links
from tpqwen.step import Capacity, RankStats, StepInput, StepOutput, decode_output, encode

SEND_TIMEOUT_S = 10.0
LOOK_S = 0.05  # how long to wait for rank 0 before looking at the others
RECEIPT_S = 3.0  # for a rank to take the oldest step, which it does before it computes anything
STALL_S = 0.75  # of a step that is due and on which no rank computes
WORK_LOOK_S = 0.15
IDLE_SHARE = 0.05  # of a CPU; a Ray worker that only waits uses 0.01 to 0.02
GRACE_S = 0.3  # a dead rank breaks its neighbours' collectives; their complaints may arrive before its death shows


class ProcessWatch:
    """Notices the end of processes of this node, however they end, by one system call (Linux; blind elsewhere)."""

    def __init__(self, processes: Mapping[int, int]) -> None:
        self._poll = select.poll()
        self._ranks: dict[int, int] = {}  # descriptor -> rank
        self._gone: int | None = None
        for rank, pid in processes.items() if hasattr(os, "pidfd_open") else ():
            try:
                descriptor = os.pidfd_open(pid)
            except ProcessLookupError:
                self._gone = rank
                continue
            self._ranks[descriptor] = rank
            self._poll.register(descriptor, select.POLLIN)

    def dead(self) -> int | None:
        """A rank whose process has ended, if any."""
        if self._gone is None and self._ranks and (events := self._poll.poll(0)):
            self._gone = min(self._ranks[descriptor] for descriptor, _ in events)
        return self._gone

    def close(self) -> None:
        """Idempotent."""
        while self._ranks:
            descriptor, _ = self._ranks.popitem()
            self._poll.unregister(descriptor)
            os.close(descriptor)


class WorkWatch:
    """Notices that none of some processes of this node computes, by the CPU time they use (Linux; blind elsewhere).

    A step that is held up on a busy machine gets or wants some of it, so a hang is told long before a deadline may be.
    """

    def __init__(self, pids: Collection[int]) -> None:
        self._pids = pids
        self._used: list[float] = []
        self._looked = 0.0
        self._idle_s = 0.0

    def begin(self) -> None:
        """Forget what was seen."""
        self._idle_s, self._looked, self._used = 0.0, 0.0, []

    def idle_s(self) -> float:
        """For how long none of them has worked, from the first call after `begin` on; call it often."""
        now = time.monotonic()
        if not self._pids or now - self._looked < WORK_LOOK_S:
            return self._idle_s
        used = [s for pid in self._pids if (s := processes.cpu_s(pid)) is not None]
        passed, before = now - self._looked, self._used
        self._looked, self._used = now, used
        if len(used) == len(before) == len(self._pids):
            if max(b - a for a, b in zip(before, used, strict=True)) >= IDLE_SHARE * passed:
                self._idle_s = 0.0
            elif not any(map(processes.wants_cpu, self._pids)):
                # at most two looks' worth: the whole machine may have been paused, this process included
                self._idle_s += min(passed, 2 * WORK_LOOK_S)
        return self._idle_s


class RingExecutor:
    """Implements executor.protocol.Executor over the channels to ranks that have loaded already.

    idle_is_hung: ranks compute on CPUs, so one that uses no CPU time has nothing to do or waits for another.
    """

    def __init__(self, capacity: Capacity, links: Links, *, depth: int, epoch: int, idle_is_hung: bool = False) -> None:
        self.depth = depth
        self._capacity = capacity
        self._links = links
        self._epoch = epoch
        self._marks: deque[int] = deque()  # of the steps in flight: what a rank has to have taken
        pids = links.processes()
        self._watch = ProcessWatch(pids)
        self._work = WorkWatch(pids.values() if idle_is_hung and len(pids) == len(links.receivers) else ())

    def start(self) -> Capacity:
        """What the ranks can hold together."""
        return self._capacity

    def submit(self, step: StepInput) -> None:
        """One write for all local ranks. Raises RankDied when a rank has ended or no longer takes steps."""
        self._raise_if_dead()
        data = encode(step)
        try:
            for sender in self._links.senders:
                sender.send(data, SEND_TIMEOUT_S)
            self._marks.append(self._links.written())
        except (TimeoutError, ConnectionError) as error:
            self._raise_if_dead()
            raise RankDied(f"a rank no longer takes steps: {error}") from None

    def collect(self, timeout_s: float) -> StepOutput:
        """Rank 0's next output. Raises RankDied when a rank has ended, failed, not taken the step or not in time."""
        begin = time.monotonic()
        self._work.begin()
        while True:
            waited = time.monotonic() - begin
            output = self._hear(0, max(0.0, min(LOOK_S, timeout_s - waited)))
            if output is not None:
                self._marks.popleft()
                return output
            self._raise_if_dead()
            for rank in range(1, len(self._links.receivers)):
                self._hear(rank, 0.0)
            if waited >= min(timeout_s, RECEIPT_S):
                self._look_for_silence(waited)
            if (idle_s := self._work.idle_s()) >= STALL_S:
                self._look_for_silence(waited)
                raise RankDied(f"no rank has computed for {idle_s:.1f} s on a step that all took: a collective hangs")
            if waited >= timeout_s:
                text = f"no answer within {timeout_s:.0f} s: all ranks took the step, so a collective hangs"
                raise RankDied(text)

    def ready(self) -> bool:
        """Whether rank 0 has answered."""
        return self._links.receivers[0].poll()

    def repair(self, error: RankDied) -> Capacity:
        """The ranks have another owner, whom the engine asks."""
        raise error

    def stats(self) -> list[RankStats]:
        """Asked of the ranks' actors by their owner, not through here."""
        return []

    def stop(self) -> None:
        """Close the channels; the ranks' loops end. Idempotent."""
        self._links.close()
        self._watch.close()

    def _hear(self, rank: int, timeout_s: float) -> StepOutput | None:
        """The rank's next output of this epoch. Raises RankDied when it has failed or gone."""
        try:
            data = self._links.receivers[rank].recv(timeout_s)
        except ConnectionError as error:
            self._await_death(rank)
            raise RankDied(f"rank {rank} has ended: {error}", rank=rank) from None
        if data is None:
            return None
        output = decode_output(data)
        if output.epoch != self._epoch:
            return None
        if output.error:
            self._await_death(rank)
            raise RankDied(f"rank {rank} failed: {output.error}", rank=rank)
        return output

    def _raise_if_dead(self) -> None:
        if (rank := self._watch.dead()) is not None:
            raise RankDied(f"rank {rank} died: {self._last_words(rank) or 'its process has ended'}", rank=rank)

    def _last_words(self, rank: int) -> str:
        """What the rank had to say of its own failure before it ended."""
        try:
            while (data := self._links.receivers[rank].recv(0.0)) is not None:
                if error := decode_output(data).error:
                    return error
        except ConnectionError:
            pass  # read to its end
        return ""

    def _await_death(self, complainer: int) -> None:
        """Give another rank's death the time to show: it is the cause, and the complaint only follows from it."""
        until = time.monotonic() + GRACE_S
        while time.monotonic() < until:
            if self._watch.dead() not in (None, complainer):
                self._raise_if_dead()
            time.sleep(0.01)

    def _look_for_silence(self, waited_s: float) -> None:
        if silent := self._links.silent(self._marks[0]):
            which = ", ".join(map(str, silent))
            raise RankDied(f"no answer within {waited_s:.0f} s: rank {which} did not take the step", rank=silent[0])
