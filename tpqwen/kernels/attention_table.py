"""How attention runs, per batch size and length: launch parameters, measured on an H100, up to four rows on an H200.

B decode rows, K key/value heads, G query heads per KV head, D head size, S splits. No tuning happens at run time.
"""

from __future__ import annotations

from typing import NamedTuple

MAX_ROWS = 1024  # that decode in one pass
MAX_SPLITS = 64
LONG = 2048  # tokens of a whole prompt from which cuDNN beats the paged kernel
PLANNED = 512  # tokens: prompts for cuDNN, which plans every new shape anew, are rounded up to a multiple
ENOUGH_SPLITS = 6  # a plan that gives a row so many needs no wide variant


class DecodePlan(NamedTuple):
    """How one batch bucket runs. tile: cached tokens per iteration. programs: how many to aim at, which sets S.

    min_tiles: least work worth a split. prefetch: tiles of K and V asked into L2 first of all. hold: the first tile
    waits in registers before the queries are there, which pays where a program has few tiles.
    stages: depth of the tile loop; table entry and tile are two dependent loads, so 5 keeps two tiles in flight.
    registers: most registers of a thread, where that lets one program more run on a multiprocessor; 0: as the compiler
    likes. even: all tiles of the batch are divided evenly over `programs` (attention_even.py), whatever the rows'
    lengths; min_tiles, prefetch and hold then mean nothing.
    """

    tile: int
    warps: int
    stages: int
    programs: int
    min_tiles: int = 1
    prefetch: int = 0
    hold: bool = False
    registers: int = 0
    even: bool = False


# (G, D): plans by largest batch of the bucket, ascending. Measured with 8 KV heads, where rows stay whole from 25 on;
# a rank that has fewer heads divides them.
PLANS: dict[tuple[int, int], tuple[tuple[int, DecodePlan], ...]] = {
    (2, 128): (
        (1, DecodePlan(tile=32, warps=2, stages=3, programs=256, prefetch=1)),
        (4, DecodePlan(tile=32, warps=2, stages=4, programs=512, hold=True)),
        (8, DecodePlan(tile=64, warps=4, stages=2, programs=384, hold=True)),
        (24, DecodePlan(tile=64, warps=4, stages=2, programs=256, hold=True)),
        (48, DecodePlan(tile=64, warps=4, stages=3, programs=200, hold=True)),
        (64, DecodePlan(tile=32, warps=2, stages=5, programs=392, hold=True)),
        (192, DecodePlan(tile=64, warps=4, stages=3, programs=520, prefetch=1)),
        (1 << 30, DecodePlan(tile=32, warps=2, stages=5, programs=1544, prefetch=1, registers=128)),
    ),
}
OTHER_PLANS: tuple[tuple[int, DecodePlan], ...] = (
    (1, DecodePlan(tile=32, warps=2, stages=3, programs=256, prefetch=1)),
    (4, DecodePlan(tile=32, warps=2, stages=4, programs=512, hold=True)),
    (24, DecodePlan(tile=64, warps=4, stages=2, programs=256)),
    (48, DecodePlan(tile=64, warps=4, stages=2, programs=200)),
    (64, DecodePlan(tile=32, warps=2, stages=5, programs=392, prefetch=1)),
    (192, DecodePlan(tile=64, warps=4, stages=3, programs=520, prefetch=1)),
    (1 << 30, DecodePlan(tile=64, warps=4, stages=2, programs=1544, prefetch=1, registers=128)),
)
WIDE_PLAN = DecodePlan(tile=64, warps=4, stages=3, programs=264, even=True)  # two on each of an H100's multiprocessors


def decode_plan(batch: int, kv_heads: int, group: int, head_dim: int, *, wide: bool = False) -> DecodePlan:
    """The tuned plan of a batch size; other groups and head sizes take the tensor-core plans.

    wide: the variant for passes in which some row is long, so that no program has it alone. It is the usual plan where
    that has splits enough.
    """
    if wide and has_wide(batch, kv_heads, group, head_dim):
        return WIDE_PLAN
    return _tuned(batch, group, head_dim)


def has_wide(batch: int, kv_heads: int, group: int, head_dim: int) -> bool:
    """Whether the wide plan of a batch size is another one than the usual."""
    return batch > 0 and num_splits(_tuned(batch, group, head_dim), batch * kv_heads) < ENOUGH_SPLITS


def _tuned(batch: int, group: int, head_dim: int) -> DecodePlan:
    return next(plan for limit, plan in PLANS.get((group, head_dim), OTHER_PLANS) if batch <= limit)


def num_splits(plan: DecodePlan, rows_and_heads: int) -> int:
    """Programs per (row, KV head): a function of B * K alone."""
    return max(1, min(MAX_SPLITS, -(-plan.programs // rows_and_heads)))


def num_parts(plan: DecodePlan, rows_and_heads: int) -> int:
    """Places for partial results that a launch needs; what lies in one piece needs none."""
    if plan.even:
        return plan.programs + rows_and_heads
    splits = num_splits(plan, rows_and_heads)
    return rows_and_heads * splits if splits > 1 else 1


def planned_lengths(longest: int) -> list[int]:
    """Whole prompts of up to `longest` tokens, one of each shape that cuDNN is asked for."""
    rounded = range(LONG, -(-longest // PLANNED) * PLANNED + 1, PLANNED) if longest >= LONG else ()
    return [min(length, longest) for length in rounded]
