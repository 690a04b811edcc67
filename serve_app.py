"""Entry point of Ray Serve: `serve run serve_app:app model=Qwen/Qwen3-8B tp=2`; without arguments, our small model."""

from __future__ import annotations

from ray.serve import Application

from tpqwen.config import Config
from tpqwen.errors import ConfigError
from tpqwen.service import build_app

OF_THE_COMMAND = ("host", "port", "ingress")  # `tpqwen serve` starts Serve; here it runs already


def app(args: dict[str, str]) -> Application:
    """args are the options of tpqwen.config, as strings. Raises ConfigError in one sentence."""
    for name in OF_THE_COMMAND:
        if name in args:
            raise ConfigError(f"{name} is for `tpqwen serve`; here Serve listens where its own http_options say")
    return build_app(Config.load(args))
