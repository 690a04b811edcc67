"""API keys: the text that lists them, and a ring that knows only their hashes.

One key a line, words separated by blanks, `#` begins a comment:

    ID  KEY  [requests_per_minute=N] [tokens_per_minute=N] [concurrency=N] [priority=N]

KEY is the key itself or `sha256:` and its hex digest. ID is what logs and the share-out between keys go by; it may
stand on two lines while a key is being replaced. The ID `*` without a key sets limits for all that state none. A limit
that is not stated is none; priority is the best (lowest) that the key's requests may ask for, 0 unless stated.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from hashlib import sha256
from hmac import compare_digest

from tpqwen.errors import ConfigError

MIN_KEY_LENGTH = 20  # characters; a key is random, so that a plain SHA-256 of it cannot be searched
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_DIGEST = re.compile(r"sha256:([0-9a-fA-F]{64})")
_NUMBER = re.compile(r"-?[0-9]{1,12}")


@dataclass(frozen=True)
class KeyLimits:
    """What one key may use; None is no limit. Requests and tokens per minute, requests at once."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrency: int | None = None
    priority: int = 0


@dataclass(frozen=True)
class ApiKey:
    """Whose request it is. There is no secret in it."""

    id: str
    limits: KeyLimits = KeyLimits()


_LIMITS = {f.name for f in fields(KeyLimits)}


class Keyring:
    """The keys in force: SHA-256 digests and what belongs to them. Replaced as a whole when the list changes."""

    def __init__(self, entries: list[tuple[bytes, ApiKey]]) -> None:
        self._entries = entries

    @staticmethod
    def parse(text: str) -> Keyring:
        """Raises ConfigError naming the line, never its content."""
        defaults = KeyLimits()
        lines: list[tuple[str, bytes, dict[str, int]]] = []
        stated: dict[str, dict[str, int]] = {}
        for number, line in enumerate(text.splitlines(), 1):
            words = line.partition("#")[0].split()
            if not words:
                continue
            if words[0] == "*":
                defaults = KeyLimits(**_limits(words[1:], number))
                continue
            name, digest, limits = _key(words, number)
            if limits and stated.setdefault(name, limits) != limits:
                raise ConfigError(f"API keys, line {number}: other limits for {name} stand above")
            lines.append((name, digest, limits))
        if not lines:
            raise ConfigError("API keys: there is no key in the list")
        if len({digest for _, digest, _ in lines}) < len(lines):
            raise ConfigError("API keys: a key is listed twice")
        keys = {name: ApiKey(name, replace(defaults, **stated.get(name, {}))) for name, _, _ in lines}
        return Keyring([(digest, keys[name]) for name, digest, _ in lines])

    def find(self, token: str) -> ApiKey | None:
        """Whose token it is. Takes equally long for every token of one length: all digests are compared."""
        digest = sha256(token.encode("utf-8", "surrogateescape")).digest()
        found = None
        for known, key in self._entries:
            if compare_digest(known, digest):
                found = key
        return found

    @property
    def ids(self) -> list[str]:
        """Each id once, in the order of the list."""
        return list(dict.fromkeys(key.id for _, key in self._entries))

    def get(self, key_id: str) -> ApiKey | None:
        """The key of this id."""
        return next((key for _, key in self._entries if key.id == key_id), None)

    def replace(self, other: Keyring) -> None:
        """Take over another ring's keys; those that are no longer there are invalid from now on."""
        self._entries = other._entries


def _key(words: list[str], number: int) -> tuple[str, bytes, dict[str, int]]:
    name = words[0]
    if not _ID.fullmatch(name):
        raise ConfigError(f"API keys, line {number}: an id has 1 to 64 of A-Z a-z 0-9 . _ -")
    if len(words) < 2 or words[1].partition("=")[0] in _LIMITS:
        raise ConfigError(
            f"API keys, line {number}: after the id {name} comes its key, or sha256: and the key's digest"
        )
    if given := _DIGEST.fullmatch(words[1]):
        digest = bytes.fromhex(given[1])
    elif words[1].startswith("sha256:"):
        raise ConfigError(f"API keys, line {number}: a SHA-256 digest has 64 hexadecimal digits")
    elif len(words[1]) < MIN_KEY_LENGTH:
        raise ConfigError(f"API keys, line {number}: a key has at least {MIN_KEY_LENGTH} random characters")
    else:
        digest = sha256(words[1].encode()).digest()
    return name, digest, _limits(words[2:], number)


def _limits(words: list[str], number: int) -> dict[str, int]:
    limits: dict[str, int] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name not in _LIMITS or name in limits or not _NUMBER.fullmatch(value):
            raise ConfigError(
                f"API keys, line {number}: limits are {', '.join(sorted(_LIMITS))}, each as name=number once"
            )
        limits[name] = int(value)
        if name != "priority" and limits[name] < 1:
            raise ConfigError(f"API keys, line {number}: {name} must be at least 1")
    return limits
