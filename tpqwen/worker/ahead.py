"""CUDA graphs captured, and long prompts tried, before they are needed: one in each idle step.

A graph that is captured when it is first needed holds every running stream up, for 60 ms, and for seconds where its
kernels have never been compiled; cuDNN makes a plan for every new length of prompt, for 80 ms. So the engine makes idle
steps while nobody waits (engine/loop.py). A pass runs collectives, so all ranks of a group take the same ones in the
same order and stop at the same one. While kernels are being compiled (worker/builder.py), idle steps wait for theirs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from tpqwen.kernels.attention_table import planned_lengths
from tpqwen.parallel.group import TPGroup
from tpqwen.step import DRAFT_ROWS, GIVEN_UP, LONG_ROW, TOKEN_BUCKETS, chunk_places, row_bucket
from tpqwen.worker.builder import Builder
from tpqwen.worker.drafts import DraftGraphs
from tpqwen.worker.graphs import DecodeGraphs, buckets
from tpqwen.worker.mixed import MixedGraphs, row_buckets
from tpqwen.worker.sampler import USUAL_KINDS, SampleKind

FEW = 8  # decode rows; passes with no more come first, with prompts of all lengths
WAIT_S = 0.02  # for kernels, in one idle step: a request that comes meanwhile waits as long
_FULL, _EARLY, _READY = range(3)  # what a rank says in an idle step: no memory; no kernels yet; it can capture
GRAPHS_SHARE = 0.5  # of the memory that memory_fraction leaves: what graphs captured ahead may take


class Prompt(NamedTuple):
    """A whole prompt that is launched kernel by kernel."""

    tokens: int


class Pass(NamedTuple):
    """A pass that has a graph, by its buckets; tokens 0: decode rows alone. drafts: tokens drafted for each of them."""

    rows: int
    tokens: int
    kind: SampleKind
    wide: bool = False
    drafts: int = 0


def planned(max_rows: int, max_tokens: int, max_length: int) -> list[Pass]:
    """The passes that steps may need, the most usual first: few streams, then prompts beside few, then many streams.

    max_rows: slots; max_tokens: of one step, decode rows included; max_length: of one sequence.
    """
    at_most = min(max_rows, max_tokens)
    sizes = [(rows, 0) for fewest, rows in _ranges(1, buckets(max_rows)) if fewest <= at_most]
    for fewest, rows in _ranges(0, row_buckets(max_rows)):
        fewer = 0  # chunks that a smaller graph has room for
        for shortest, tokens in _ranges(1, TOKEN_BUCKETS):
            chunks = min(chunk_places(tokens), at_most - fewest)  # each has a slot of its own
            if chunks > fewer or shortest <= min(max_tokens - fewest, chunks * max_length):
                sizes.append((rows, tokens))
            fewer = chunk_places(tokens)
    sizes.sort(key=lambda size: (False, *reversed(size)) if size[0] <= FEW else (True, *size))
    return [Pass(*size, kind) for size in sizes for kind in USUAL_KINDS]


def wide_variants(usual: Sequence[Pass], max_length: int, has_wide: Callable[[int], bool]) -> list[Pass]:
    """The same passes while a row is long, as far as they are others then. has_wide: as Runner's, by rows."""
    if max_length - 1 <= LONG_ROW:  # a sequence's last token never gets into the cache
        return []
    return [p._replace(wide=True) for p in usual if has_wide(p.rows)]


def with_drafts(usual: Sequence[Pass], max_tokens: int, drafts: int) -> list[Pass]:
    """The usual passes, and behind each of few decode rows alone the one that speculates, where there is such."""
    widest = row_bucket(min(DRAFT_ROWS, max_tokens // (drafts + 1))) if drafts else 0
    passes = ((p, p._replace(drafts=drafts)) if not p.tokens and p.rows <= widest else (p,) for p in usual)
    return [p for pair in passes for p in pair]


def prompts(max_tokens: int, max_length: int) -> list[Prompt]:
    """One of each shape that cuDNN plans."""
    return [Prompt(length) for length in planned_lengths(min(max_tokens, max_length))]


def least_free(memory_fraction: float, share: float) -> int:
    """Bytes of the device that must stay free, asked when all is loaded: what the largest step takes is not used up.

    share: this rank's part of the device. Where it is not the whole, what is free says nothing: others may be loading.
    """
    free, total = torch.cuda.mem_get_info()
    spare = (1.0 - memory_fraction) * total
    return free - round(GRAPHS_SHARE * spare) if share == 1.0 else round((1.0 - GRAPHS_SHARE) * spare)


def place(
    p: Pass, decode: DecodeGraphs, mixed: MixedGraphs, drafts: DraftGraphs
) -> tuple[DecodeGraphs | MixedGraphs | DraftGraphs, tuple[Any, ...]]:
    """Whose the pass is, and its key there."""
    if p.drafts:
        return drafts, (p.rows, p.kind, p.drafts)
    if p.tokens:
        return mixed, (p.rows, p.tokens, p.kind, p.wide)
    return decode, (p.rows, p.kind, p.wide)


class Ahead:
    """What one rank has still to capture. It holds keys only: nothing here leads to a graph, which has to go when its
    group does.

    builder: compiles the passes' kernels, in their order; None where nobody does.
    """

    def __init__(
        self,
        group: TPGroup,
        passes: Sequence[Pass | Prompt] = (),
        least_free_bytes: int = 0,
        builder: Builder | None = None,
    ) -> None:
        self._group = group
        self._passes = passes
        self._least_free = least_free_bytes
        self._builder = builder
        self._left = deque(passes)

    def __len__(self) -> int:
        return len(self._left)

    def close(self) -> None:
        """No more is compiled for it."""
        if self._builder:
            self._builder.close()

    def renew(self) -> None:
        """There are no graphs (any more)."""
        self._left = deque(self._passes)

    def capture(self, decode: DecodeGraphs, mixed: MixedGraphs, drafts: DraftGraphs) -> int:
        """Capture the next pass that has not been captured meanwhile, or try a prompt. Returns how many are left, or
        GIVEN_UP. Nothing happens while a rank has not got the kernels.

        Any error but a ConnectionError (as from `graphs.capture`) leaves the rank unfit: others may wait for it in the
        pass's collectives, and the stream of a capture that was cut off stays the current one.
        """
        if not self._left:
            return 0
        everybody_is = self._least(decode, self._state())
        if everybody_is == _FULL:
            self._left.clear()
            return GIVEN_UP
        if everybody_is == _READY:
            self._capture(decode, mixed, drafts)
            self._least(decode, _READY)  # who fails fails in this step, not under the next request
        if not self._left and self._builder:
            self._builder.leave()
        return len(self._left)

    def _capture(self, decode: DecodeGraphs, mixed: MixedGraphs, drafts: DraftGraphs) -> None:
        while self._left:
            p = self._left.popleft()
            if isinstance(p, Prompt):
                mixed.try_prompt(p.tokens)
                return
            graphs, key = place(p, decode, mixed, drafts)
            if graphs.prepare(*key):
                return

    def _state(self) -> int:
        if self._builder and not self._builder.built(1 + len(self._passes) - len(self._left), WAIT_S):
            return _EARLY
        torch.cuda.empty_cache()
        return _READY if torch.cuda.mem_get_info()[0] >= self._least_free else _FULL

    def _least(self, decode: DecodeGraphs, mine: int) -> int:
        """The least of what the ranks say; waits for all of them."""
        answers = self._group.all_gather(torch.full((1,), mine, dtype=torch.int32, device=decode.slots.device))
        decode.settle()
        return int(answers.min())


def _ranges(first: int, bounds: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The smallest number that each bucket holds, and the bucket."""
    return zip((first, *(bound + 1 for bound in bounds)), bounds, strict=False)
