"""Kernels compiled before they are needed: those of the first steps beside the loading of weights, others after it.

On a machine that never compiled them the first ones take longer than a small model's weights, which only wait for the
disk, and one after another, each in the step that needs it, all of them take two minutes.

What a pass launches is decided in many places by shapes, so nothing here lists kernels: the passes themselves run on a
model of two layers, of the real widths and full of zeros. First without launching anything, so that what they would
launch is compiled at once (worker/builder.py); then the first ones for good, one after another in one thread, since
Triton 3.6 mixes up launchers that are loaded in several.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch

from tpqwen.kernels import ops
from tpqwen.parallel.group import TPGroup
from tpqwen.parallel.peers import compile_exchange
from tpqwen.step import TOKEN_BUCKETS, RowParams
from tpqwen.worker.ahead import Pass, Prompt, place
from tpqwen.worker.batch import blank_prompt
from tpqwen.worker.drafts import DraftGraphs
from tpqwen.worker.graphs import DecodeGraphs
from tpqwen.worker.mixed import MixedGraphs
from tpqwen.worker.runner import Runner
from tpqwen.worker.sampler import USUAL_KINDS, SampleKind

NUM_LAYERS = 2  # products share norms with those of the next layer
WHOLE = 2048  # tokens of a prompt that is launched kernel by kernel
UNLIKE = (1, 2, 16)  # numbers that Triton compiles for: one, most, and multiples of sixteen
EAGER = (16, 32, 64, 128, 256, 512)  # tokens of prompts that differ in the kernels of their attention
NUM_BLOCKS = 2  # of the runner's cache; what is written goes to the null block

_log = logging.getLogger(__name__)
Part = Callable[[], object]
Build = Callable[[Sequence[Part], Sequence[Part], Sequence[Part]], None]


class Parts(NamedTuple):
    """others: of steps that have no graph. later: one for each pass that is captured ahead, in their order."""

    first: list[Part]
    others: list[Part]
    later: list[Part]


class Alone(TPGroup):
    """A rank that talks to nobody: shards as in the group, collectives that give back what they are given.

    The kernels that peers would use are compiled, whether or not the ranks will be peers: a rank that replaces another
    one loads before it knows.
    """

    def __init__(self, group: TPGroup) -> None:
        super().__init__(group.rank, group.size, None)

    def add_reduced(self, partial: torch.Tensor, residual: torch.Tensor, *, ordered: bool = False) -> torch.Tensor:
        compile_exchange(self.size, partial, residual)
        return residual + partial

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        compile_exchange(self.size, x)
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        compile_exchange(self.size, x, summed=False)
        return torch.stack([x] * self.size)


@contextmanager
def compiled_beside(make: Callable[[], Parts], build: Build) -> Iterator[None]:
    """While the body runs, make the parts, build what they will launch and run the first ones in a thread; leaves when
    all of that is done.

    build: as worker/builder.py does. What fails is no error: whoever needs the kernel compiles it again, and there it
    is.
    """
    thread = threading.Thread(target=_run, args=(make, build), name="early", daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def _run(make: Callable[[], Parts], build: Build) -> None:
    made = [Parts([], [], [])]  # whoever builds is told that there is nothing to do, too
    _quietly(lambda: made.append(make()))
    _quietly(partial(build, *made[-1]))
    for part in made[-1].first:
        _quietly(part)


@torch.inference_mode()
def _quietly(part: Part) -> None:
    try:
        part()
    except Exception as error:
        _log.warning("kernels not compiled early: %s: %s", type(error).__name__, error)


@torch.inference_mode()
def early_parts(runner: Runner, group: TPGroup, passes: Sequence[Pass | Prompt], drafts: int = 0) -> Parts:
    """The first ones together launch what the first passes of a server do: decode steps of one row and a prompt of up
    to 64 tokens as a graph's pass, with the kinds of sampling that need no host; a speculative step of one row where
    there are drafts; a long prompt, the choice among a whole row's ids, and what comes between passes.

    runner: has NUM_LAYERS layers and nothing in its slots; it is of no use afterwards. passes: those captured ahead.
    drafts: tokens that it drafts for a row.
    """
    state, size = runner.state, runner.cache.block_size
    slots = state.tensors.padding_slot
    decode = DecodeGraphs(runner, group, slots, enabled=False)
    mixed = MixedGraphs(runner, decode, slots, size, enabled=False)
    draft = DraftGraphs(runner, decode, enabled=False)

    def launched(p: Pass | Prompt) -> Part:
        if isinstance(p, Prompt):
            return lambda: None  # its layers are those of a long prompt; cuDNN's plans cannot be made ahead
        graphs, key = place(p, decode, mixed, draft)
        return partial(graphs.launch, *key)

    none, longest = decode.slots[:0], state.tensors.tables_SM.shape[1] * size

    def prompt(num_tokens: int) -> Part:
        return partial(runner.mixed, none, blank_prompt(0, num_tokens, state, size), SampleKind(), ())

    first = [Pass(*shape, kind) for shape in ((1, 0), (0, TOKEN_BUCKETS[0])) for kind in USUAL_KINDS]
    first += [Pass(1, 0, kind, drafts=drafts) for kind in USUAL_KINDS if drafts]
    return Parts(
        [
            *map(launched, first),
            prompt(min(WHOLE, longest)),
            partial(_sample, runner, torch.zeros_like(decode.slots[:1]), SampleKind(full=True)),
            partial(_edit, runner),
        ],
        [*_with_the_host(runner, none), *(prompt(length) for length in EAGER if length <= longest)],
        [launched(p) for p in passes],
    )


def _with_the_host(runner: Runner, none: torch.Tensor) -> Iterator[Part]:
    """Sampling in which the host decides, so that it has no graph: with penalties, a bias or a guide, and
    log-probabilities. none: no slots."""
    for rows in UNLIKE:
        slots = none.new_zeros(rows)
        for candidates in (True, False):
            yield partial(_sample, runner, slots, SampleKind(candidates=candidates, edits=True))
        for wanted in UNLIKE[:2]:
            yield partial(_sample, runner, slots, SampleKind(logprobs=True), wanted)


def _sample(runner: Runner, slots_R: torch.Tensor, kind: SampleKind, wanted: int = -1) -> None:
    """The end of a pass with chunks. wanted: log-probabilities of so many."""
    row = RowParams(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, choice=0, logprobs=wanted)
    logits = runner.model.logits(runner.blank_hidden(len(slots_R)))
    runner.sample(logits, slots_R, kind, (row,) * len(slots_R))


def _edit(runner: Runner) -> None:
    """What a step changes before its pass: a block of a slot, here the null block's, and the rows that decode."""
    state = runner.state.tensors
    edits, slots = state.tables_SM.new_zeros(1, 3), state.length.new_zeros(1)
    ops.edit_slots(state.tables_SM, edits)
    ops.set_rows(state.length.new_zeros(state.padding_slot), slots, state.padding_slot)
