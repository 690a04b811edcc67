"""How much each API key may use: requests and tokens per minute, requests at once; and what answers say of it.

Every replica decides by its own buckets, at once and without asking. What other replicas took is charged to them
afterwards (`others_took`), so that a limit holds for all replicas together: exactly over time, within one round of
`tpqwen.ledger` at any moment. A bucket may therefore be in debt, and then nothing is admitted until it is paid off.

Tokens of an answer are charged as they are generated: whenever a key's next request asks, and when an answer ends.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from tpqwen.api.keys import ApiKey, Keyring
from tpqwen.errors import Overloaded

MINUTE_S = 60.0
FORGET_AFTER_S = 300.0  # a key that was idle for so long has full buckets whatever happened before

Headers = list[tuple[bytes, bytes]]


@dataclass
class Bucket:
    """Holds up to `limit` units and gets `limit` of them a minute; starts full."""

    limit: int
    level: float
    filled_at: float

    def refill(self, now: float) -> None:
        """Bring the level to this moment."""
        self.level = min(self.level + (now - self.filled_at) * self.limit / MINUTE_S, float(self.limit))
        self.filled_at = now

    def seconds_until(self, amount: float) -> float:
        """Until the level is `amount`, at most the limit, if nothing is taken meanwhile."""
        return max(min(amount, self.limit) - self.level, 0.0) * MINUTE_S / self.limit


@dataclass(frozen=True)
class Usage:
    """Of one key on one replica: requests and tokens since it started, requests now running."""

    requests: int = 0
    tokens: int = 0
    running: int = 0


@dataclass
class Account:
    """One key's buckets and running requests."""

    key: ApiKey
    requests: Bucket | None
    tokens: Bucket | None
    leases: set[Lease] = field(default_factory=set)
    num_requests: int = 0
    num_tokens: int = 0
    running_elsewhere: int = 0
    used_at: float = 0.0

    @property
    def usage(self) -> Usage:
        return Usage(self.num_requests, self.num_tokens, len(self.leases))


class Limiter:
    """The accounts of all keys on this replica. Belongs to the event loop."""

    def __init__(self, keys: Keyring, clock: Callable[[], float] = time.monotonic) -> None:
        self._keys = keys
        self._clock = clock
        self._accounts: dict[str, Account] = {}

    def lease(self, key: ApiKey) -> Lease:
        """A request of this key; nothing is counted before `Lease.begin`."""
        return Lease(self, key)

    def account(self, key: ApiKey) -> Account:
        """The key's account as of now. New limits of a reloaded key apply at once, with full buckets."""
        now = self._clock()
        account = self._accounts.get(key.id)
        if account is None or account.key.limits != key.limits:
            old = account
            account = Account(
                key, _bucket(key.limits.requests_per_minute, now), _bucket(key.limits.tokens_per_minute, now)
            )
            if old is not None:
                account.leases, account.num_requests, account.num_tokens = old.leases, old.num_requests, old.num_tokens
            self._accounts[key.id] = account
        account.used_at = now
        for bucket in (account.requests, account.tokens):
            if bucket is not None:
                bucket.refill(now)
        for lease in account.leases:
            lease.settle()
        return account

    def take(self, key_id: str, *, requests: int = 0, tokens: int = 0) -> None:
        """Charge what this replica served."""
        account = self._accounts[key_id]
        account.num_requests += requests
        account.num_tokens += tokens
        _charge(account, requests, tokens)

    def give_back(self, lease: Lease) -> None:
        """The lease no longer runs."""
        account = self._accounts.get(lease.key.id)
        if account is not None:
            account.leases.discard(lease)
            account.used_at = self._clock()

    def usage(self) -> dict[str, Usage]:
        """Of all keys; accounts that are idle for long are forgotten here."""
        now = self._clock()
        for account in list(self._accounts.values()):
            for lease in account.leases:
                lease.settle()
            if not account.leases and now - account.used_at > FORGET_AFTER_S:
                del self._accounts[account.key.id]
        return {name: account.usage for name, account in self._accounts.items()}

    def others_took(self, taken: dict[str, Usage]) -> None:
        """Charge what other replicas served since the last call; `running` is what runs there now."""
        for name in taken:
            if name not in self._accounts and (key := self._keys.get(name)):
                self.account(key)
        for name, account in self._accounts.items():
            usage = taken.get(name, Usage())
            account.running_elsewhere = usage.running
            _charge(account, usage.requests, usage.tokens)


class Lease:
    """One request of one key, from its arrival to the end of its answer. `close` it in any case."""

    def __init__(self, limiter: Limiter, key: ApiKey) -> None:
        self.key = key
        self._limiter = limiter
        self._generated: Callable[[], int] | None = None
        self._charged = 0

    def begin(self) -> None:
        """Count a request. Raises Overloaded: requests_per_minute, concurrency."""
        account = self._limiter.account(self.key)
        bucket, most = account.requests, self.key.limits.concurrency
        if bucket is not None and bucket.level < 1:
            text = f"this key may send {bucket.limit} requests a minute"
            raise Overloaded(text, code="requests_per_minute", retry_after_s=bucket.seconds_until(1))
        if most is not None and len(account.leases) + account.running_elsewhere >= most:
            raise Overloaded(f"this key may have {most} requests at once", code="concurrency")
        self._limiter.take(self.key.id, requests=1)
        account.leases.add(self)

    def charge_prompt(self, num_tokens: int) -> None:
        """Count the prompt's tokens. Raises Overloaded: tokens_per_minute."""
        account = self._limiter.account(self.key)
        bucket = account.tokens
        if bucket is not None and bucket.level < num_tokens:
            text = f"this key may use {bucket.limit} tokens a minute, and the prompt has {num_tokens}"
            never = num_tokens > bucket.limit
            wait_s = bucket.seconds_until(num_tokens)
            raise Overloaded(text, code="tokens_per_minute", retry_after_s=wait_s, may_retry=not never)
        self._limiter.take(self.key.id, tokens=num_tokens)

    def meter(self, generated: Callable[[], int]) -> None:
        """How many tokens the answer has by now."""
        self._generated = generated

    def settle(self) -> None:
        """Charge what has been generated since the last call."""
        if self._generated is not None:
            total = self._generated()
            self._limiter.take(self.key.id, tokens=total - self._charged)
            self._charged = total

    def close(self) -> None:
        """The answer has ended. Idempotent."""
        self.settle()
        self._generated = None
        self._limiter.give_back(self)

    def headers(self) -> Headers:
        """x-ratelimit-* of the limits that this key has, in OpenAI's names."""
        account = self._limiter.account(self.key)
        out: Headers = []
        for name, bucket in ((b"requests", account.requests), (b"tokens", account.tokens)):
            if bucket is not None:
                out += [
                    (b"x-ratelimit-limit-" + name, b"%d" % bucket.limit),
                    (b"x-ratelimit-remaining-" + name, b"%d" % max(int(bucket.level), 0)),
                    (b"x-ratelimit-reset-" + name, b"%.3fs" % bucket.seconds_until(bucket.limit)),
                ]
        if (most := self.key.limits.concurrency) is not None:
            left = max(most - len(account.leases) - account.running_elsewhere, 0)
            out += [
                (b"x-ratelimit-limit-concurrency", b"%d" % most),
                (b"x-ratelimit-remaining-concurrency", b"%d" % left),
            ]
        return out


def _bucket(limit: int | None, now: float) -> Bucket | None:
    return None if limit is None else Bucket(limit, float(limit), now)


def _charge(account: Account, requests: int, tokens: int) -> None:
    if account.requests is not None:
        account.requests.level -= requests
    if account.tokens is not None:
        account.tokens.level -= tokens
