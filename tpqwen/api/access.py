"""Who may ask: keys at the door, their limits, and what a request of a key is marked with for the engine.

Without keys everything is open and nothing is marked. With keys every path is closed unless it is named here, whether
there is a route behind it or not; the decision reads the path alone, never the Host header.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from hmac import digest

import msgspec

from tpqwen.api.calls import Prepared
from tpqwen.api.exchange import Exchange
from tpqwen.api.keys import ApiKey, Keyring
from tpqwen.api.limits import Limiter
from tpqwen.api.running import Running
from tpqwen.errors import RequestError
from tpqwen.request import GenerateRequest

OPEN_PATHS = frozenset({"/health", "/ready", "/", "/docs"})  # the last two are the same bytes everywhere: no data
METRICS_PATH = "/metrics"


class Access:
    """keys: the ring in force, or None where the server is open. open_metrics: /metrics needs no key either.

    The secret that separates the keys' prefix caches is drawn here: the cache lives no longer than its replica.
    """

    def __init__(self, keys: Keyring | None = None, *, open_metrics: bool = False) -> None:
        self._keys = keys
        self._open_paths = OPEN_PATHS | ({METRICS_PATH} if open_metrics else set())
        self._secret = secrets.token_bytes(32)
        self.limiter = Limiter(keys or Keyring([]))

    def admit(self, exchange: Exchange) -> None:
        """Note whose request it is. Raises RequestError 401: missing_api_key, invalid_api_key."""
        if self._keys is None or exchange.path in self._open_paths:
            return
        token = _token(exchange.headers)
        if token is None:
            text = "an API key is needed: Authorization: Bearer KEY"
            raise RequestError(text, code="missing_api_key", status=401, type="authentication_error")
        exchange.key = self._keys.find(token)
        if exchange.key is None:
            text = "this API key is not known here"
            raise RequestError(text, code="invalid_api_key", status=401, type="authentication_error")
        exchange.numbers["key"] = exchange.key.id

    @contextmanager
    def counted(self, exchange: Exchange) -> Iterator[None]:
        """The request counts against its key's limits while the block runs. Raises Overloaded."""
        if exchange.key is None:
            yield
            return
        lease = self.limiter.lease(exchange.key)
        exchange.lease = lease
        try:
            lease.begin()
            yield
        finally:
            lease.close()

    def marked(self, exchange: Exchange, prepared: Prepared) -> Prepared:
        """The same sequences as this key's: charged, with its share and with a prefix cache of its own.

        Raises Overloaded when the prompt is more than the key may use now, RequestError on a priority that it has not.
        """
        key = exchange.key
        if key is None or exchange.lease is None:
            return prepared
        for request in prepared.sequences:
            if request.priority < key.limits.priority:
                text = f"requests of this key may have priority {key.limits.priority} at best"
                raise RequestError(text, param="priority", code="out_of_range")
        exchange.lease.charge_prompt(prepared.num_prompt_tokens)
        return replace(prepared, sequences=[self._marked(key, request) for request in prepared.sequences])

    def watch(self, exchange: Exchange, running: Running) -> None:
        """From now on the answer's tokens are charged as they come."""
        if exchange.lease is not None:
            exchange.lease.meter(lambda: running.usage.completion)

    def _marked(self, key: ApiKey, request: GenerateRequest) -> GenerateRequest:
        named = f"{key.id}\0{request.cache_salt}".encode()
        salt = digest(self._secret, named, "sha256").hex()
        return msgspec.structs.replace(request, cache_salt=salt, tenant=key.id)


def _token(headers: Mapping[str, str]) -> str | None:
    """OpenAI's way or Anthropic's."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    return headers.get("x-api-key") or None
