"""Kernels of the first steps, compiled beside the loading of weights.

On a machine that never compiled them they take longer than a small model's weights, which only wait for the disk.

What a pass launches is decided in many places by shapes, so nothing here lists kernels: the parts of the first passes
run on a model of one layer, of the real widths and full of zeros. First without launching anything, so that what they
would launch is compiled at once (kernels/build.py); then for good, one after another in one thread, since Triton 3.6
mixes up launchers that are loaded in several.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from tpqwen.kernels import ops
from tpqwen.kernels.context import StepContext
from tpqwen.parallel.group import TPGroup
from tpqwen.parallel.peers import compile_exchange
from tpqwen.step import TOKEN_BUCKETS, Chunk, chunk_places, packed
from tpqwen.worker.batch import ChunkBatch, Stager, blank_prompt, chunk_batch, chunk_parts
from tpqwen.worker.mixed import graph_lengths, pad
from tpqwen.worker.runner import Runner
from tpqwen.worker.sampler import USUAL_KINDS, SampleKind

WHOLE = 2048  # tokens of a prompt that is launched kernel by kernel
NUM_BLOCKS = 2  # of the runner's cache; what is written goes to the null block

_log = logging.getLogger(__name__)
Part = Callable[[], object]
Build = Callable[[Sequence[Part]], None]


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
def compiled_beside(make: Callable[[], list[Part]], build: Build) -> Iterator[None]:
    """While the body runs, make the parts, build what they will launch and run them in a thread; leaves when all of
    that is done.

    build: as ops.building gives. What fails is no error: whoever needs the kernel compiles it again, and there it is.
    """
    thread = threading.Thread(target=_run, args=(make, build), name="early", daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def _run(make: Callable[[], list[Part]], build: Build) -> None:
    parts: list[Part] = []
    _quietly(lambda: parts.extend(make()))
    _quietly(lambda: build(parts))
    for part in parts:
        _quietly(part)


@torch.inference_mode()
def _quietly(part: Part) -> None:
    try:
        part()
    except Exception as error:
        _log.warning("kernels not compiled early: %s: %s", type(error).__name__, error)


@torch.inference_mode()
def first_parts(runner: Runner, drafts: int = 0) -> list[Part]:
    """Parts that together launch what the first passes of a server do: a prompt of up to 64 tokens as a graph's pass, a
    long one, and decode steps of one row, with the kinds of sampling that need no host; the choice among a whole row's
    ids, what comes between passes, and a speculative step of one row where there are drafts.

    runner: has one layer and nothing in its slots; it is of no use afterwards. drafts: tokens that it drafts for a row.
    """
    device = runner.state.tensors.length.device
    none, first = (torch.arange(n, dtype=torch.int32, device=device) for n in (0, 1))
    nobody = runner.state.tensors.padding_slot
    few = torch.full((chunk_places(TOKEN_BUCKETS[0]),), nobody, dtype=torch.int32, device=device)
    parts: list[Part] = []
    parts.append(partial(runner.model.embed.embed, first))
    contexts = [(1, runner.decode_context(first)[1])]
    state, size = runner.state, runner.cache.block_size
    whole = blank_prompt(0, min(WHOLE, state.tensors.tables_SM.shape[1] * size), state, size)
    for chunks in (_padded_chunks(runner), whole):
        contexts.append((len(chunks.ids), runner.mixed_context(none, chunks)[1]))
    for kind in USUAL_KINDS:
        parts.append(partial(runner.finish, runner.blank_hidden(1), first, kind))
        parts.append(partial(_sample, runner, few, kind))
    parts.append(partial(_sample, runner, first, SampleKind(full=True)))
    for count, context in contexts:
        parts.append(partial(_layer, runner, count, context))
        parts.append(partial(_layers, runner, count, context))
    parts.append(partial(_edit, runner))
    if drafts:
        parts += [partial(runner.speculate, first, kind, drafts) for kind in USUAL_KINDS]
    return parts


def _layer(runner: Runner, count: int, context: StepContext) -> None:
    """One layer by itself."""
    hidden, _ = runner.model.attention[0](runner.blank_hidden(count), context)
    runner.model.mlp[0](hidden)


def _layers(runner: Runner, count: int, context: StepContext) -> None:
    """Its products as they are among those of other layers."""
    attention, mlp = runner.model.attention[0], runner.model.mlp[0]
    hidden, scaled = attention(runner.blank_hidden(count), context, None, mlp.first)
    hidden, scaled = mlp(hidden, scaled, attention.first)
    attention(hidden, context, scaled)


def _sample(runner: Runner, slots_R: torch.Tensor, kind: SampleKind) -> None:
    """The end of a pass with chunks."""
    runner.sample(runner.model.logits(runner.blank_hidden(len(slots_R))), slots_R, kind, ())


def _edit(runner: Runner) -> None:
    """What a step changes before its pass: a block of a slot, here the null block's, and the rows that decode."""
    state = runner.state.tensors
    edits, slots = state.tables_SM.new_zeros(1, 3), state.length.new_zeros(1)
    ops.edit_slots(state.tables_SM, edits)
    ops.set_rows(state.length.new_zeros(state.padding_slot), slots, state.padding_slot)


def _padded_chunks(runner: Runner) -> ChunkBatch:
    """A pass in the smallest bucket of worker/mixed.py: one chunk fills it, the others are padding."""
    state, size = runner.state, runner.cache.block_size
    chunk = Chunk(0, 0, packed([0] * TOKEN_BUCKETS[0]), True)
    parts = pad(chunk_parts((chunk,)), TOKEN_BUCKETS[0], state.tensors.padding_slot)
    sent = Stager(state.tensors.length.device, 1).send(parts)
    return chunk_batch(sent, graph_lengths(TOKEN_BUCKETS[0]), state, size)
