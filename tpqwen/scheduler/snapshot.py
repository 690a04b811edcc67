"""What a scheduler holds, for people who look on. Pure, like the scheduler, and made only when somebody asks."""

from __future__ import annotations

from tpqwen.scheduler.scheduler import Scheduler
from tpqwen.step import SlotView, Snapshot


def snapshot(scheduler: Scheduler) -> Snapshot:
    """Slots, blocks and queue as they are. Changes nothing of that; takes some microseconds for each taken slot."""
    pool = scheduler.pool
    slots = [
        SlotView(s.slot, "prefill" if s.num_chunked < s.num_prefill else "decode", s.num_tokens, s.settled)
        for s in scheduler.rows.up_to_date()
    ]
    return Snapshot(
        num_slots=scheduler.rows.num_slots,
        slots=slots,
        blocks_used=pool.num_used,
        blocks_cached=pool.num_cached,
        blocks_free=pool.num_free,
        num_waiting=scheduler.num_waiting,
        waiting_tokens=scheduler.waiting_tokens,
    )
