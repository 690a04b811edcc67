"""Faults in our processes, without a line in the product: Python imports this at start when the folder is on its path.

It does nothing unless TPQWEN_FAULTS names a folder. Then the worker and the engine core report events as they run (see
EVENTS), and the plan in that folder (plan.json, a list of dictionaries) says who fails at which one:

    {"id": "unique", "who": "rank 1", "event": "decode", "at": 7, "how": "kill"}

is the seventh decode step that rank 1 submits after the plan was written. how: kill (SIGKILL), stop (SIGSTOP), raise,
hang (the call never returns), nan (a row of the rank's next step is NaN). Each id fires once, whatever
process it is that gets there.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import sys
import threading
import time

FOLDER = os.environ.get("TPQWEN_FAULTS", "")


class Plan:
    """The plan as it is now, and how often each event has happened under it in this process."""

    def __init__(self) -> None:
        self._written = 0
        self._faults: list[dict] = []
        self._counts: dict[tuple[str, str], int] = {}
        self._lock = threading.Lock()

    def event(self, who: str, name: str) -> str:
        """Something happens; perhaps it does not get further. Returns what the caller has to do itself ("nan")."""
        with self._lock:
            self._read()
            key = (who, name)
            self._counts[key] = count = self._counts.get(key, 0) + 1
            due = [f for f in self._faults if (f["who"], f["event"], f["at"]) == (*key, count)]
        for fault in due:
            if self._claim(fault["id"]):
                return self._strike(fault["how"])
        return ""

    def _read(self) -> None:
        path = os.path.join(FOLDER, "plan.json")
        try:
            written = os.stat(path).st_mtime_ns
            if written != self._written:
                with open(path) as file:
                    self._faults = json.load(file)
                self._written, self._counts = written, {}
        except FileNotFoundError:
            self._faults = []

    def _claim(self, fault_id: str) -> bool:
        with contextlib.suppress(FileExistsError):
            os.close(os.open(os.path.join(FOLDER, f"{fault_id}.fired"), os.O_CREAT | os.O_EXCL))
            return True
        return False

    def _strike(self, how: str) -> str:
        if how in ("kill", "stop"):
            os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSTOP)
        elif how == "raise":
            raise RuntimeError("injected failure")
        elif how == "hang":
            while True:
                time.sleep(3600)
        return how


def patch_worker(module) -> None:
    """Events of a rank: load, prefill (a step with chunks), draft (one that speculates), decode (any other), leave,
    rejoin."""
    worker, plan = module.Worker, Plan()

    def before(method: str, event_of) -> None:
        original = getattr(worker, method)

        def wrapped(self, *args):
            if (event := event_of(self, *args)) and plan.event(f"rank {self._group.rank}", event) == "nan":
                poison(self)
            return original(self, *args)

        setattr(worker, method, wrapped)

    def poison(self) -> None:
        """The first row of the rank's next pass is NaN from the second layer on, keys and values included."""

        def spoil(_, args):
            handle.remove()
            hidden = args[0].clone()
            hidden[0] = float("nan")
            return hidden, args[1], None, *args[3:]  # nothing else that was made of it

        handle = self.runner.model.attention[1].register_forward_pre_hook(spoil)

    def kind_of(self, step) -> str:
        rows = self._rows if step.decode is None else step.decode
        return "draft" if step.speculate else "prefill" if step.chunks else "decode" if rows else ""  # idle

    before("load", lambda self: "load")
    before("submit", kind_of)
    before("leave", lambda self: "leave")
    before("rejoined", lambda self: "rejoin" if hasattr(self, "graphs") or hasattr(self, "_was_loaded") else mark(self))

    def mark(self) -> str:
        self._was_loaded = True
        return ""


def patch_core(module) -> None:
    """Events of the engine: step."""
    core, plan = module.EngineCore, Plan()
    original = core.step

    def step(self):
        plan.event("engine", "step")
        return original(self)

    core.step = step


def patch_loop(module) -> None:
    """Events of the engine: resume."""
    loop, plan = module.EngineLoop, Plan()
    original = loop._resume

    def resume(self, command):
        plan.event("engine", "resume")
        return original(self, command)

    loop._resume = resume


def patch_speculation(module) -> None:
    """Where drafts are made at all, three steps of four make them, whatever they cost: faults find some in flight."""
    speculation = module.Speculation

    def pays(self, bucket):
        self.asked = getattr(self, "asked", 0) + 1
        return self.asked % 4 > 0

    speculation._pays = pays


EVENTS = {
    "tpqwen.worker.worker": patch_worker,
    "tpqwen.engine.core": patch_core,
    "tpqwen.engine.loop": patch_loop,
    "tpqwen.scheduler.speculation": patch_speculation,
}


class Finder:
    """Lets the ordinary finders find the module, and patches it once it has been executed."""

    def find_spec(self, name, path=None, target=None):
        if name not in EVENTS:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module) -> None:
                execute(module)
                EVENTS[name](module)

            spec.loader.exec_module = exec_module
        return spec


if FOLDER:
    sys.meta_path.insert(0, Finder())
