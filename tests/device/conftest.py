"""Triton kernels under test run on the GPU where there is one and in Triton's interpreter otherwise."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
import torch


def _interpret_kernels() -> None:
    """Switch triton to its interpreter, before any test module imports a kernel: triton.jit reads the variable then."""
    assert "triton" not in sys.modules or os.environ.get("TRITON_INTERPRET") == "1", "triton was imported too early"
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: object, scope: interpreter._LangPatchScope) -> None:
        """triton 3.6 keeps scalars as arrays of one element, which numpy 2.4 no longer turns into an int by itself."""
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda scalar: scalar.handle.data.item())

    interpreter._patch_lang_tensor = patched


if not torch.cuda.is_available():
    _interpret_kernels()


@pytest.fixture
def device() -> torch.device:
    """Where kernels run: the GPU, or the CPU under the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def dots_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of a product gets the same bits wherever it stands, as on a GPU; the BLAS that the interpreter calls rounds
    it by its place among the others on some CPUs (AMD's)."""
    if torch.cuda.is_available():
        return
    from triton.runtime import interpreter

    whole = interpreter.InterpreterBuilder.create_dot

    def by_row(builder: Any, a: Any, b: Any, d: Any, *how: Any) -> Any:
        pairs = ((a, a.data[:, None]), (b, b.data[None]), (d, d.data[:, None]))
        result = whole(builder, *(interpreter.TensorHandle(data, x.dtype) for x, data in pairs), *how)
        result.data = result.data[:, 0]
        return result

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", by_row)
