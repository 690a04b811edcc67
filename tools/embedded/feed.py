"""Training rows made by worker processes while the model learns from the earlier ones."""

from __future__ import annotations

import multiprocessing
import os
import random
from collections import deque
from concurrent.futures import Executor, Future, ProcessPoolExecutor

import numpy as np

from embedded.corpus import Material, shard

KEPT_SHARDS = 64  # to go on with while new ones are late


def processes(number: int) -> ProcessPoolExecutor:
    """Workers for any number of feeds; they start as soon as they are given work."""
    return ProcessPoolExecutor(number, multiprocessing.get_context("spawn"), initializer=one_thread_each)


def one_thread_each() -> None:
    """Keeps the tokenizer of this process from starting a thread per core beside the other workers'."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


class Feed:
    """The shards of one row length, in the order of their numbers.

    With patience every row is new and the same run comes out every time. Without it, rows of earlier shards are used
    again whenever a new shard is not ready.
    """

    def __init__(self, pool: Executor, material: Material, row_tokens: int, ahead: int, patient: bool) -> None:
        """row_tokens: ids in a row, one more than the model reads. ahead: shards in the making."""
        self._pool, self._material, self._row_tokens, self._patient = pool, material, row_tokens, patient
        self._rng = random.Random(material.seed)
        self._coming: deque[Future[np.ndarray]] = deque()
        self._kept: deque[np.ndarray] = deque(maxlen=KEPT_SHARDS)
        self._rest = np.empty((0, row_tokens), dtype=np.uint16)
        self._made = self.new_tokens = 0
        for _ in range(ahead):
            self._order()

    def _order(self) -> None:
        self._coming.append(self._pool.submit(shard, self._material, self._row_tokens, self._made))
        self._made += 1

    def _shard(self) -> np.ndarray:
        """The next new shard [R, row_tokens], or an old one."""
        if self._kept and not self._patient and not self._coming[0].done():
            return self._kept[self._rng.randrange(len(self._kept))]
        found = self._coming.popleft().result()
        self._order()
        self._kept.append(found)
        self.new_tokens += found.size
        return found

    def rows(self, number: int) -> np.ndarray:
        """The next rows [number, row_tokens], uint16."""
        while len(self._rest) < number:
            self._rest = np.concatenate([self._rest, self._shard()])
        found, self._rest = self._rest[:number], self._rest[number:]
        return found
