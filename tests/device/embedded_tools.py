"""Modules of the training script in tools/, which is no part of the package."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
MODEL = ROOT / "tpqwen" / "embedded" / "model"


def tool(name: str) -> Any:
    """A module of tools/embedded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools"))
        return importlib.import_module(f"embedded.{name}")
