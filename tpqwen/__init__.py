"""Serve Qwen3 on your own GPUs. The public names load on first use, so that importing a submodule stays cheap."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tpqwen.config import Config as Config
    from tpqwen.llm import LLM as LLM
    from tpqwen.llm import RequestOutput as RequestOutput
    from tpqwen.request import SamplingParams as SamplingParams
    from tpqwen.stopping import stop as stop

__version__ = "0.1.0"

_HOMES = {
    "LLM": "tpqwen.llm",
    "RequestOutput": "tpqwen.llm",
    "SamplingParams": "tpqwen.request",
    "Config": "tpqwen.config",
    "stop": "tpqwen.stopping",
}
__all__ = ["LLM", "Config", "RequestOutput", "SamplingParams", "__version__", "stop"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'tpqwen' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
