"""Whether Serve is ending this replica, and for how long it will wait for what is still open.

Serve tells a deployment only when it has stopped waiting (`__del__`), or not at all: what is open after
graceful_shutdown_timeout_s is killed with the replica. There is no public sign of the beginning, so this looks at
Serve's own object in this process; Ray's version is pinned, and tests/cluster/test_serve_shutdown.py says when it has
changed.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from ray._private.worker import global_worker

POLL_S = 0.25
MARGIN_S = 10.0  # for clients to read how it ended, for Serve to see that nothing is open, and for our processes to end

_log = logging.getLogger(__name__)


async def shutdown_begins() -> float | None:
    """Wait until Serve ends this replica; seconds that open requests have from then on.

    None, at once and with a warning, where Serve's object is not as it was.
    """
    try:
        replica = _own_replica()
        while not replica._shutting_down:
            await asyncio.sleep(POLL_S)
        return patience(float(replica._deployment_config.graceful_shutdown_timeout_s))
    except (AttributeError, LookupError) as error:
        text = "streams that outlive Serve's patience will be torn without an error event"
        _log.warning("this Serve does not show when it ends a replica (%s): %s", error, text)
        return None


def patience(timeout_s: float) -> float:
    """Of Serve's own, what is left when the margin is kept; half of it where it is short."""
    return max(timeout_s - MARGIN_S, timeout_s / 2)


def _own_replica() -> Any:
    """Serve's Replica, whose user code this is. The actor is the only one of its process. Raises LookupError."""
    for actor in global_worker.actors.values():
        if hasattr(actor, "_replica_impl"):
            return actor._replica_impl
    raise LookupError("no actor has _replica_impl")
