"""Entry point of Ray Serve: `serve run serve_app:app model=Qwen/Qwen3-8B tp=2`; without arguments, our small model."""

from __future__ import annotations

from ray.serve import Application

from tpqwen.config import Config
from tpqwen.service import build_app


def app(args: dict[str, str]) -> Application:
    """args are the options of tpqwen.config, as strings. Raises ConfigError in one sentence."""
    return build_app(Config.load(args))
