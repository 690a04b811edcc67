"""One variant of a kernel as literals: what is sent to the process that compiles it. Without PyTorch, and Triton
only once a variant is looked at."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import ast
import hashlib
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from triton.compiler import ASTSource

END = "."  # the last line that is sent: no kernel comes any more
TYPE = "triton.language.dtype"  # marks a constant that is a type
NAME_LENGTH = 150  # of a kernel's files in the cache, as triton.compiler cuts it


class Kernel(NamedTuple):
    """One variant of a kernel, all of it literals. Constants and attributes by their place among the arguments."""

    module: str
    name: str
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]
    target: tuple[str, int, int]  # kind of device, its architecture, threads of a warp

    def source(self) -> ASTSource:
        """What Triton compiles."""
        from triton.compiler import ASTSource

        function = getattr(import_module(self.module), self.name)
        constants = {place: _constant(value) for place, value in self.constants.items()}
        return ASTSource(function, self.signature, constants, self.attributes)

    def is_cached(self) -> bool:
        """Whether Triton would find it compiled."""
        from triton._C.libtriton import get_cache_invalidating_env_vars
        from triton.backends.compiler import GPUTarget
        from triton.compiler import make_backend
        from triton.runtime.cache import get_cache_key, get_cache_manager

        source, backend = self.source(), make_backend(GPUTarget(*self.target))
        key = get_cache_key(source, backend, backend.parse_options(self.options), get_cache_invalidating_env_vars())
        name = f"{source.name[:NAME_LENGTH]}.json"
        manager = get_cache_manager(hashlib.sha256(key.encode()).hexdigest())
        return name in (manager.get_group(name) or {})


def literal(value: Any) -> Any:
    """A constant as a literal: Triton's types by their names."""
    from triton.language import dtype

    return (TYPE, value.name) if isinstance(value, dtype) else value


def _constant(value: Any) -> Any:
    """What `literal` was given."""
    from triton.language import dtype

    return dtype(value[1]) if isinstance(value, tuple) and value[:1] == (TYPE,) else value


def parse(line: str) -> Kernel:
    """From its repr as a tuple. Raises ValueError where that holds more than literals."""
    try:
        return Kernel(*ast.literal_eval(line))
    except SyntaxError as error:  # an object's "<function ...>"
        raise ValueError(str(error)) from None
