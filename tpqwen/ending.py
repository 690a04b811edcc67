"""Whether Serve is ending this replica, and for how long it will wait for what is still open.

Serve tells a deployment only when it has stopped waiting (`__del__`), or not at all: what is open after
graceful_shutdown_timeout_s is killed with the replica. There is no public sign of the beginning, so this looks at
Serve's own object in this process; Ray's version is pinned, and tests/cluster/test_serve_shutdown.py says when it has
changed.
"""

from __future__ import annotations

import asyncio
from typing import Any

from ray._private.worker import global_worker

POLL_S = 0.25
MARGIN_S = 10.0  # for clients to read how it ended, for Serve to see that nothing is open, and for our processes to end


async def shutdown_begins() -> float:
    """Wait until Serve ends this replica; seconds that open requests have from then on."""
    replica = _own_replica()
    while not replica._shutting_down:
        await asyncio.sleep(POLL_S)
    return patience(float(replica._deployment_config.graceful_shutdown_timeout_s))


def patience(timeout_s: float) -> float:
    """Of Serve's own, what is left when the margin is kept; half of it where it is short."""
    return max(timeout_s - MARGIN_S, timeout_s / 2)


def _own_replica() -> Any:
    """Serve's Replica, whose user code this is. The actor is the only one of its process."""
    return next(a._replica_impl for a in global_worker.actors.values() if hasattr(a, "_replica_impl"))
