"""Settings that Ray reads from the environment when it is first imported; a user's own always win."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Mapping, MutableMapping, Sequence

from tpqwen import ray_token

ALWAYS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # today's notice about CUDA_VISIBLE_DEVICES of actors without GPU
    "RAY_DEDUP_LOGS": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "1",  # else, with throughput settings, handles want an event loop here
}
PRIVATE_CLUSTER = {
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",  # a hung replica frees its GPUs 10 s earlier
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",  # a killed proxy is back in seconds, not in half a minute
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "2",
}
HAPROXY = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1",  # else 1000 lines are written at once, while streams wait
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",  # HAProxy looks 4 times a second; the default waits 30 s
}
HAPROXY_FILES = {
    "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": "haproxy.cfg",
    "RAY_SERVE_HAPROXY_SOCKET_PATH": "admin.sock",
    "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": "",
    "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": "server-state",
}
HAPROXY_PORTS = {  # what listens beside the API's port, and where
    "RAY_SERVE_HAPROXY_STATS_PORT": (8404, "HAProxy's statistics, all addresses"),
    "RAY_SERVE_HAPROXY_METRICS_PORT": (9101, "HAProxy's metrics, all addresses"),
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": (8500, "Serve's proxy behind it"),
    "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": (30000, "the first replica"),
}


def set_ray_defaults(environ: MutableMapping[str, str], words: Sequence[str] = ()) -> None:
    """Complete the environment before Ray is imported. words: the command line.

    Without RAY_ADDRESS the command starts a cluster of its own, guarded by a token (ray_token.py), unless it is one for
    running clusters. RAY_AUTH_MODE is always explicit, since Ray's default depends on what ran before.
    """
    settings = dict(ALWAYS)
    if "RAY_ADDRESS" in environ or "stop" in [word for word in words if not word.startswith("-")][:1]:
        has_token = "RAY_AUTH_TOKEN" in environ or "RAY_AUTH_TOKEN_PATH" in environ
        settings["RAY_AUTH_MODE"] = "token" if has_token else "disabled"
    else:
        settings |= PRIVATE_CLUSTER
        ray_token.guard(environ)
        if wants_haproxy(environ, words):
            # Its admin socket may be written by everyone who reaches it: it lies where nobody else does.
            folder = tempfile.mkdtemp(prefix="tpqwen-haproxy-")
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            settings |= HAPROXY | {name: f"{folder}/{file}".rstrip("/") for name, file in HAPROXY_FILES.items()}
    for name, value in settings.items():
        environ.setdefault(name, value)


def wants_haproxy(environ: Mapping[str, str], words: Sequence[str]) -> bool:
    """Whether the option ingress says haproxy: a flag goes before the environment, the last flag before the others."""
    chosen = environ.get("TPQWEN_INGRESS", "")
    for word, following in zip(words, [*words, ""][1:], strict=True):
        if word == "--ingress":
            chosen = following
        elif word.startswith("--ingress="):
            chosen = word.partition("=")[2]
    return chosen == "haproxy"


def haproxy_ports(environ: Mapping[str, str]) -> dict[int, str]:
    """What HAProxy's mode opens besides the API's port; empty in Serve's own."""
    if environ.get("RAY_SERVE_ENABLE_HA_PROXY") != "1":
        return {}
    return {int(environ.get(name, default)): use for name, (default, use) in HAPROXY_PORTS.items()}
