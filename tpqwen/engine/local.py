"""The engine in a thread of this process, behind the same messages as the engine process."""

from __future__ import annotations

import threading
from collections.abc import Callable

from tpqwen.config import ScheduleOptions
from tpqwen.engine.client import EngineClient
from tpqwen.engine.core import EngineCore
from tpqwen.engine.loop import EngineLoop
from tpqwen.step import StepStats
from tpqwen.transport.channel import QueueChannel


def start_local_engine(
    core: EngineCore, options: ScheduleOptions, on_stats: Callable[[StepStats], None] | None = None
) -> EngineClient:
    """Run the core in a daemon thread; call from the event loop that will use it. close() ends the thread."""
    commands, reports = QueueChannel(), QueueChannel()
    loop = EngineLoop(core, commands, reports)
    threading.Thread(target=loop.run, name="engine", daemon=True).start()
    return EngineClient(commands, reports, core.capacity, options, on_stats)
