"""A Ray cluster of one's own takes in nobody without its token. Ray reads these settings when it is imported."""

from __future__ import annotations

import secrets
from collections.abc import MutableMapping


def guard(environ: MutableMapping[str, str]) -> None:
    """Ask for a token that lives and dies with this process, unless somebody wants it otherwise or RAY_ADDRESS names a
    cluster that is there already. Nothing is written to the home directory."""
    if "RAY_ADDRESS" in environ or environ.setdefault("RAY_AUTH_MODE", "token") != "token":
        return
    if "RAY_AUTH_TOKEN_PATH" not in environ:
        environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
