"""Where API keys come from, a mounted file or the environment, and how a changed file comes into force."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

from tpqwen.api.keys import Keyring
from tpqwen.errors import ConfigError

LOOK_EVERY_S = 2.0

_log = logging.getLogger(__name__)

Stamp = tuple[int, int, int]


def find_keys(path: str | None, listed: str) -> tuple[Keyring | None, KeyFile | None]:
    """The keys of the file, else those of the list, else none; and the file to follow. Raises ConfigError."""
    if path is not None:
        file = KeyFile(path)
        return file.load(), file
    return (Keyring.parse(listed) if listed.strip() else None), None


class KeyFile:
    """A list of keys in a file. A mounted secret is exchanged by a link, so the file behind it is what is watched."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._seen: Stamp | None = None  # inode, size and time of what was last read; None: there was no file

    def load(self) -> Keyring:
        """Raises ConfigError."""
        self._seen = self._stamp()
        try:
            listed = Path(self.path).read_text(encoding="utf-8")
            mode = os.stat(self.path).st_mode
        except (OSError, ValueError) as error:
            raise ConfigError(f"api_keys_file {self.path} cannot be read: {error}") from None
        if mode & 0o004:
            _log.warning("api_keys_file=%s can be read by every user of this machine; chmod 600 it", self.path)
        return Keyring.parse(listed)

    async def follow(self, ring: Keyring, every_s: float = LOOK_EVERY_S) -> None:
        """Until cancelled: a changed file replaces the ring's keys, unless it cannot be read or meant."""
        while True:
            await asyncio.sleep(every_s)
            if await asyncio.to_thread(self._stamp) == self._seen:
                continue
            try:
                ring.replace(await asyncio.to_thread(self.load))
            except ConfigError as error:
                _log.error("the old API keys stay in force error=%s", error)
                continue
            _log.info("API keys reloaded ids=%s", ",".join(ring.ids))

    def _stamp(self) -> Stamp | None:
        try:
            found = os.stat(self.path)
        except OSError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns
