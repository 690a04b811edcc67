"""Which kernels launches would need: noted, and not launched."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from triton import knobs
from triton.runtime import driver

from tpqwen.kernels.variant import Kernel, literal, parse

_log = logging.getLogger(__name__)


def _noted(call: dict[str, Any]) -> str:
    """The repr of the kernel that Triton's hook is told of."""
    compiled, target = call["compile"], driver.active.get_current_target()
    stored = json.loads(compiled["specialization_data"])["options"]  # JSON has no tuples
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()}
    where = (target.backend, target.arch, target.warp_size)
    constants = {place: literal(value) for place, value in compiled["constants"].items()}
    types = (compiled["signature"], constants, compiled["configs"][0])
    return repr((call["fn"].module, call["fn"].name, *types, options, where))


class _Zeroed(TorchFunctionMode):
    """Memory is zero where it would be left as it is: what a kernel that is not launched should have written."""

    UNWRITTEN = frozenset({torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result.zero_() if func in self.UNWRITTEN else result


@contextmanager
def recorded(note: Callable[[Kernel], None]) -> Iterator[None]:
    """Kernels that this thread would have to compile or read are noted, each once, and not launched. What cannot be
    written as literals is left out."""
    seen: set[str] = set()
    thread, before = threading.get_ident(), knobs.runtime.jit_cache_hook

    def hook(**call: Any) -> bool:
        if threading.get_ident() != thread:
            return before is not None and bool(before(**call))
        line = _noted(call)
        if line not in seen:
            seen.add(line)
            try:
                kernel = parse(line)
            except ValueError:
                _log.debug("kernel %s takes more than literals", call["fn"].name)
            else:
                note(kernel)
        return True

    knobs.runtime.jit_cache_hook = hook
    try:
        with _Zeroed():
            yield
    finally:
        knobs.runtime.jit_cache_hook = before
