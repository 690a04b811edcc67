"""Settings that Ray reads from the environment when it is first imported; a user's own always win."""

from __future__ import annotations

import secrets
from collections.abc import MutableMapping

ALWAYS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # today's notice about CUDA_VISIBLE_DEVICES of actors without GPU
    "RAY_DEDUP_LOGS": "0",
}
PRIVATE_CLUSTER = {
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",  # a hung replica frees its GPUs 10 s earlier
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",  # a killed proxy is back in seconds, not in half a minute
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "2",
}


def set_ray_defaults(environ: MutableMapping[str, str]) -> None:
    """Complete the environment before Ray is imported.

    Without RAY_ADDRESS the command starts a cluster of its own, guarded by a token that lives and dies with it: nothing
    is written to the home directory. RAY_AUTH_MODE is always explicit, since Ray's default depends on what ran before.
    """
    settings = dict(ALWAYS)
    if "RAY_ADDRESS" in environ:
        has_token = "RAY_AUTH_TOKEN" in environ or "RAY_AUTH_TOKEN_PATH" in environ
        settings["RAY_AUTH_MODE"] = "token" if has_token else "disabled"
    else:
        settings |= PRIVATE_CLUSTER
        settings["RAY_AUTH_MODE"] = "token"
        if environ.get("RAY_AUTH_MODE", "token") == "token" and "RAY_AUTH_TOKEN_PATH" not in environ:
            settings["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    for name, value in settings.items():
        environ.setdefault(name, value)
