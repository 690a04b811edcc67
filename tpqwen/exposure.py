"""No open door by oversight: without keys a server is for its own machine only, unless somebody wants it otherwise.

Where Serve listens is for Serve to say: on a running cluster, or with its HAProxy, that is not what `host` says. It has
no public way to ask; Ray's version is pinned, and tests/cluster/test_access.py says when this has changed.
"""

from __future__ import annotations

import logging

import ray
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

from tpqwen.errors import ConfigError

LOOPBACK = ("127.0.0.1", "localhost", "::1")

_log = logging.getLogger(__name__)


def refuse_strangers(host: str, *, closed: bool, insecure: bool) -> None:
    """closed: there are keys. Raises ConfigError."""
    if not closed and not insecure and host not in LOOPBACK:
        text = f"listening on {host} needs API keys (--api-keys-file or TPQWEN_API_KEYS), so that not everyone"
        raise ConfigError(f"{text} who reaches this host can use it; --insecure goes without")


async def serve_host() -> str:
    """The address on which Serve's proxies of this cluster listen; loopback where it has none.

    Where this Serve does not say, loopback too, and a warning.
    """
    try:
        controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
        options = await controller.get_http_config.remote()
        return options.host or LOOPBACK[0]
    except (AttributeError, ValueError) as error:
        _log.warning("this Serve does not show where it listens, so keys may be missing unnoticed: %s", error)
        return LOOPBACK[0]
