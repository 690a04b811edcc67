"""Guided rows of one rank: their states by slot, and the masks of a step over this rank's part of the vocabulary.

Every rank follows the tokens by itself, so no mask crosses the wire. A step's masks depend on the tokens of the step
before. They are looked at after this step's forward pass has been launched and before its sampling is: the device
computes while the host waits for them and fills the masks, so the pipeline stays as deep as without guides.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tpqwen.errors import EngineError
from tpqwen.parallel.group import TPGroup
from tpqwen.step import Admit, Ints, ints
from tpqwen.worker.guide import GuideState

if TYPE_CHECKING:
    from tpqwen.grammar import Vocabulary

AT_ONCE = 32  # rows whose masks are unpacked together: 32 bits of each become 32 integers
Rows = list[tuple[int, GuideState]]  # with the row's index in the step


class GuideRows:
    """R rows in a step, V local ids from first_id on. The vocabulary is read when first needed, or before (`read`)."""

    def __init__(
        self, folder: Path, vocab_size: int, first_id: int, num_local: int, device: torch.device, group: TPGroup
    ) -> None:
        self._states: dict[int, GuideState] = {}  # by slot
        self._rows: Rows = []
        self._unread: deque[tuple[Rows, Ints, torch.cuda.Event | None]] = deque()
        self._device = device
        self._group = group
        self._num_words = -(-vocab_size // 32)
        ids = torch.arange(first_id, first_id + num_local, dtype=torch.int64, device=device)
        self._word_V = (ids >> 5).clamp(max=self._num_words - 1)
        self._shift_V = (ids & 31).to(torch.int32)
        self._source = (folder, vocab_size)
        self._vocabulary: Future[Vocabulary] | None = None

    def read(self) -> Future[Vocabulary]:
        """Begin to read the vocabulary, unless that has been done."""
        if self._vocabulary is None:
            self._vocabulary = Future()
            thread = threading.Thread(target=_read, args=(*self._source, self._vocabulary), daemon=True)
            thread.start()
        return self._vocabulary

    def admit(self, admit: Admit) -> None:
        """The slot's new sequence: guided or not."""
        self._states.pop(admit.slot, None)
        if admit.guide is not None:
            self._states[admit.slot] = GuideState(admit.guide, self.read().result(), ints(admit.output).tolist())

    def forget(self) -> None:
        """No slot is taken, and tokens that have not been read mean nothing."""
        self._states.clear()
        self._unread.clear()
        self._rows = []

    def select(self, slots: Sequence[int]) -> None:
        """The rows that the step now being launched samples, in order."""
        self._rows = [(i, self._states[s]) for i, s in enumerate(slots) if s in self._states] if self._states else []

    def apply(self, logits_RV: torch.Tensor) -> torch.Tensor:
        """The same logits (changed in place) with -inf where a row's guide allows no token. Waits for the tokens of the
        step before; raises ConnectionError when the group is called off."""
        if not self._rows:
            return logits_RV
        self._catch_up()
        pinned = self._device.type == "cuda"
        masks = torch.zeros((len(self._rows), self._num_words), dtype=torch.int32, pin_memory=pinned)
        where = torch.tensor([row for row, _ in self._rows], pin_memory=pinned)
        array = masks.numpy()
        for i, (_, state) in enumerate(self._rows):
            state.fill(array, i)
        masks, where = (t.to(self._device, non_blocking=True) for t in (masks, where))
        for rows, words in zip(torch.split(where, AT_ONCE), torch.split(masks, AT_ONCE), strict=True):
            forbidden = (words[:, self._word_V] >> self._shift_V) & 1 == 0
            logits_RV[rows] = logits_RV[rows].masked_fill_(forbidden, float("-inf"))
        return logits_RV

    def sampled(self, tokens: Ints, done: torch.cuda.Event | None) -> None:
        """The step's tokens (there once `done` has passed; -1: bad logits) in the order of `select`."""
        if self._rows:
            self._unread.append((self._rows, tokens, done))

    def _catch_up(self) -> None:
        while self._unread:
            rows, tokens, done = self._unread.popleft()
            if done is not None:
                self._group.wait_until(done.query)
            for row, state in rows:
                state.take(int(tokens[row]))


def _read(folder: Path, vocab_size: int, answer: Future[Vocabulary]) -> None:
    try:
        from tpqwen.grammar import Vocabulary  # loads xgrammar: a second that only guided requests are worth

        answer.set_result(Vocabulary(folder, vocab_size))
    except Exception as error:  # whoever waits must hear of it, whatever it is
        answer.set_exception(EngineError(f"no vocabulary for grammars in {folder}: {error}"))
