"""Executor over message channels: one encoded step to all ranks, outputs from rank 0, failures from any. No Ray here."""

from __future__ import annotations

import time

from tpqwen.errors import EngineError, RankDied
from tpqwen.step import Capacity, RankStats, StepInput, StepOutput, decode_output, encode
from tpqwen.transport.channel import Receiver, Sender

SEND_TIMEOUT_S = 10.0
LOOK_S = 0.2  # how long to wait for rank 0 before looking at the others


class RingExecutor:
    """Implements executor.protocol.Executor. senders: a ring shared by all local ranks, one TCP stream per remote rank.

    receivers: each rank's answers, in rank order.
    """

    def __init__(self, capacity: Capacity, senders: list[Sender], receivers: list[Receiver], *, depth: int) -> None:
        self.depth = depth
        self._capacity = capacity
        self._senders = senders
        self._receivers = receivers

    def start(self) -> Capacity:
        """The ranks have loaded already; what they can hold together."""
        return self._capacity

    def submit(self, step: StepInput) -> None:
        """One write for all local ranks. Raises RankDied when a rank has stopped reading."""
        data = encode(step)
        try:
            for sender in self._senders:
                sender.send(data, SEND_TIMEOUT_S)
        except (TimeoutError, ConnectionError) as error:
            raise RankDied(f"a rank no longer takes steps: {error}") from None

    def collect(self, timeout_s: float) -> StepOutput:
        """Rank 0's next output. Raises RankDied at the deadline or when a rank has gone, EngineError when one failed."""
        deadline = time.monotonic() + timeout_s
        while True:
            left = deadline - time.monotonic()
            data = self._hear(0, max(0.0, min(LOOK_S, left)))
            if data is not None:
                return self._checked(0, data)
            for rank in range(1, len(self._receivers)):
                if (data := self._hear(rank, 0.0)) is not None:
                    self._checked(rank, data)
            if left <= 0:
                raise RankDied(f"no answer from the ranks within {timeout_s:.0f} s")

    def ready(self) -> bool:
        """Whether rank 0 has answered."""
        return self._receivers[0].poll()

    def stats(self) -> list[RankStats]:
        """Asked of the ranks' actors by their owner, not through here."""
        return []

    def stop(self) -> None:
        """Close the channels; the ranks' loops end."""
        for sender in self._senders:
            sender.close()
        for receiver in self._receivers:
            receiver.close()

    def _hear(self, rank: int, timeout_s: float) -> bytes | None:
        try:
            return self._receivers[rank].recv(timeout_s)
        except ConnectionError as error:
            raise RankDied(f"rank {rank} has ended: {error}", rank=rank) from None

    def _checked(self, rank: int, data: bytes) -> StepOutput:
        output = decode_output(data)
        if output.error:
            raise EngineError(f"rank {rank}: {output.error}", code="rank_dead", status=503)
        return output
