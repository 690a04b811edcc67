"""SHA-256 of a checkpoint's files against the lists beside them, before any process is started.

A list is SHA256SUMS (or a name like it, see SUMS), *.sha256 or *.sha256sum in the model's folder, in the format of
sha256sum or of its --tag; FILE.sha256 may hold the digest alone. Of a path the last part counts, since lists are often
made elsewhere. In the Hub's cache large files are blobs whose name is their SHA-256.
"""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path

from tpqwen.errors import ConfigError
from tpqwen.machine import num_cpus
from tpqwen.model.hub import FILES

SUMS = tuple(name + end for name in ("SHA256SUMS", "SHA256SUM", "sha256sums", "sha256sum") for end in ("", ".txt"))
LISTS = (*SUMS, "*.sha256", "*.sha256sum")
LINES = (
    re.compile(r"(?P<digest>[0-9a-fA-F]{64}) [ *](?P<name>.+)"),
    re.compile(r"SHA256 \((?P<name>.+)\) = (?P<digest>[0-9a-fA-F]{64})"),
)
DIGEST = re.compile(r"[0-9a-fA-F]{64}")
MAX_LIST_BYTES = 1 << 20
MAX_THREADS = 8

Stamp = tuple[int, int, int]  # a file's size, time of change (ns) and inode: the same ones mean the same content

_log = logging.getLogger(__name__)


def check_hashes(
    folder: Path, shards: Iterable[Path], verify: bool | None, known: Mapping[str, Stamp] | None = None
) -> dict[str, Stamp]:
    """Hash what has a digest and compare. Returns the stamps of the files that were found right, by name.

    verify None: files that a list names; all shards, if one is named or a list of SUMS is there. True: every shard must
    have a digest, the Hub's count too. False: nothing. known: what an earlier call returned; files with the same stamp
    are not read again. Every byte is read once, at the pace of the disk or of up to 8 cores. Raises ConfigError naming
    the file.
    """
    if verify is False:
        return {}
    lists = sorted({p for pattern in LISTS for p in folder.glob(pattern)})
    wanted = _listed(folder, lists)
    shards = sorted(set(shards))
    if verify:
        wanted = {p.name: digest for p in shards if (digest := _blob(p))} | wanted
    missing = [p.name for p in shards if p.name not in wanted]
    if missing and (verify or len(missing) < len(shards) or any(p.name in SUMS for p in lists)):
        how = "`sha256sum *.safetensors > SHA256SUMS` makes the list"
        raise ConfigError(f"{folder}: there is no SHA-256 of {missing[0]} to verify it by; {how}")
    stamps = {name: _stamp(folder / name) for name in wanted}
    _compare(folder, {name: digest for name, digest in wanted.items() if stamps[name] != (known or {}).get(name)})
    return stamps


def _listed(folder: Path, lists: Iterable[Path]) -> dict[str, str]:
    """Name -> digest of every file of the folder that some list names and that we would read."""
    entries, idle = [], []
    for path in lists:
        here = [(name, digest, path) for name, digest in _entries(path) if _is_here(folder, name)]
        entries += here
        if not here:
            idle.append(path.name)
    if idle:
        _log.warning("%s: no file of this folder is named in %s", folder, ", ".join(idle))
    found: dict[str, str] = {}
    plain = {name for name, _, _ in entries}
    for name, digest, path in entries:
        last = name.rpartition("/")[2]
        if last != name and last in plain:  # `original/config.json` beside `config.json`
            continue
        if found.setdefault(last, digest) != digest:
            raise ConfigError(f"{path}: another line or list has another SHA-256 of {last}")
    return {name: digest for name, digest in found.items() if any(fnmatch(name, pattern) for pattern in FILES)}


def _is_here(folder: Path, name: str) -> bool:
    """Whether a listed path can mean the folder's file of that name: not when it is that of a folder in it."""
    file, listed = folder / name.rpartition("/")[2], folder / name
    return file.is_file() and (name.startswith("/") or not listed.is_file() or listed.samefile(file))


def _entries(path: Path) -> Iterable[tuple[str, str]]:
    """(name or path, digest) of each line."""
    try:
        if path.stat().st_size > MAX_LIST_BYTES:
            raise ConfigError(f"{path}: too long for a list of hashes")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    lines = [(i, line) for i, line in enumerate(text.splitlines(), 1) if line.strip() and not line.startswith("#")]
    if len(lines) == 1 and path.name not in SUMS and DIGEST.fullmatch(lines[0][1].strip()):
        yield path.stem, lines[0][1].strip().lower()
        return
    for number, line in lines:
        match = next((m for pattern in LINES if (m := pattern.fullmatch(line))), None)
        if match is None:
            raise ConfigError(f"{path}: line {number} is not as sha256sum writes it")
        yield match["name"].strip().removeprefix("./"), match["digest"].lower()


def _blob(path: Path) -> str | None:
    """The SHA-256 that a file of the Hub's cache is named after."""
    target = path.resolve()
    return target.name if target.parent.name == "blobs" and DIGEST.fullmatch(target.name) else None


def _stamp(path: Path) -> Stamp:
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino


def _compare(folder: Path, wanted: Mapping[str, str]) -> None:
    """Hash these files side by side; the first wrong one ends it."""
    if not wanted:
        return
    begin = time.monotonic()
    threads = min(len(wanted), MAX_THREADS, num_cpus())
    pool = ThreadPoolExecutor(threads, "sha256")
    try:
        for name, found in zip(wanted, pool.map(lambda name: _sha256(folder / name), wanted), strict=True):
            if found != wanted[name]:
                text = f"its SHA-256 is {found}, not {wanted[name]}"
                raise ConfigError(f"{folder / name} is damaged or not the file that was meant: {text}")
    finally:
        pool.shutdown(cancel_futures=True)
    _log.info("hashes verified files=%d seconds=%.2f", len(wanted), time.monotonic() - begin)


def _sha256(path: Path) -> str:
    """hashlib lets go of the interpreter lock while it computes."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
