"""Triton kernels under test run on the GPU where there is one and in Triton's interpreter otherwise."""

from __future__ import annotations

import os
import sys

import pytest
import torch

# Read by triton.jit when a kernel's module is imported, so it is set before any test module of this folder is.
if not torch.cuda.is_available():
    assert "triton" not in sys.modules or os.environ.get("TRITON_INTERPRET") == "1", "triton was imported too early"
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def device() -> torch.device:
    """Where kernels run: the GPU, or the CPU under the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
