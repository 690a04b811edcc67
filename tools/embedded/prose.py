"""English prose for fluency, out of three Debian packages whose texts are free (sources and licences: SOURCES).

`gather` fetches the packages with apt-get, unpacks them with dpkg-deb and writes one xz file of JSON lines, so that
the training machine needs neither the network nor Debian.
"""

from __future__ import annotations

import html
import json
import lzma
import re
import struct
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path

SOURCES = {
    "r-cran-janeaustenr": "six novels by Jane Austen (public domain; the package is MIT)",
    "python3.11-doc": "Python 3.11 documentation, prose paragraphs only (PSF licence; (c) Python Software Foundation)",
    "postgresql-doc-15": "PostgreSQL 15 manual, prose paragraphs only (PostgreSQL licence; (c) its authors)",
}
MIN_CHARS, MAX_CHARS = 200, 3200  # of one document
STRING_VECTOR, STRING = 16, 9  # type codes of R's serialisation


def gather(out: Path, work: Path) -> dict[str, str]:
    """Fetches SOURCES into work and writes their documents to out. Returns the version of each package."""
    work.mkdir(parents=True, exist_ok=True)
    versions = {name: fetch(name, work) for name in SOURCES}
    documents = [*austen(work), *python_docs(work), *postgresql_docs(work)]
    with lzma.open(out, "wt", preset=9, encoding="utf-8") as file:
        for source, text in documents:
            file.write(json.dumps([source, text], ensure_ascii=False) + "\n")
    return versions


def fetch(package: str, work: Path) -> str:
    """Downloads and unpacks a Debian package into work/package. Returns its version."""
    if not list(work.glob(f"{package}_*.deb")):
        subprocess.run(["apt-get", "download", package], cwd=work, check=True, timeout=300)
    archive = sorted(work.glob(f"{package}_*.deb"))[-1]
    subprocess.run(["dpkg-deb", "-x", str(archive), str(work / package)], check=True, timeout=300)
    return archive.name.split("_")[1].replace("%3a", ":")


def load(path: Path) -> list[tuple[str, str]]:
    """(source, text) of every document that gather wrote."""
    with lzma.open(path, "rt", encoding="utf-8") as file:
        return [(source, text) for source, text in map(json.loads, file)]


def documents_of(source: str, paragraphs: Iterator[str]) -> Iterator[tuple[str, str]]:
    """Neighbouring paragraphs joined to documents of MIN_CHARS to MAX_CHARS characters."""
    parts: list[str] = []
    size = 0
    for paragraph in paragraphs:
        if size + len(paragraph) > MAX_CHARS and size >= MIN_CHARS:
            yield source, "\n\n".join(parts)
            parts, size = [], 0
        if len(paragraph) <= MAX_CHARS:
            parts.append(paragraph)
            size += len(paragraph) + 2
    if size >= MIN_CHARS:
        yield source, "\n\n".join(parts)


def plain(text: str) -> str:
    """Typographic quotes and dashes as ASCII, white space as single blanks."""
    for odd, usual in (("“”", '"'), ("‘’", "'"), ("—", "--"), ("–", "-")):
        text = re.sub(f"[{odd}]", usual, text)
    return re.sub(r"\s+", " ", text).strip()


def austen(work: Path) -> Iterator[tuple[str, str]]:
    """The novels from R's lazy-load database: blocks of a length and a zlib stream."""
    data = next(work.glob("r-cran-janeaustenr/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb")).read_bytes()
    at = 0
    while at < len(data):
        unpacker = zlib.decompressobj()
        block = unpacker.decompress(data[at + 4 :])
        at = len(data) - len(unpacker.unused_data)
        lines = string_vector(block)
        if len(lines) > 1000:
            paragraphs = (plain(p) for p in re.split(r"\n\s*\n", "\n".join(lines)))
            yield from documents_of("austen", (p.replace("_", "") for p in paragraphs if len(p) > 40))


def string_vector(block: bytes) -> list[str]:
    """The longest character vector in one serialised R object (XDR)."""
    best: list[str] = []
    for match in re.finditer(struct.pack(">I", STRING_VECTOR), block):
        at = match.end()
        (count,) = struct.unpack_from(">I", block, at) if at + 4 <= len(block) else (0,)
        strings: list[str] = []
        at += 4
        while len(strings) < count and at + 8 <= len(block) and block[at + 3] == STRING:
            (size,) = struct.unpack_from(">i", block, at + 4)
            strings.append(block[at + 8 : at + 8 + max(size, 0)].decode("utf-8", "replace"))
            at += 8 + max(size, 0)
        best = max(best, strings, key=len)
    return best


def python_docs(work: Path) -> Iterator[tuple[str, str]]:
    """Paragraphs of running text in the documentation's reStructuredText; code, tables and directives are left out."""
    for path in sorted(work.glob("python3.11-doc/usr/share/doc/python3.11/html/_sources/**/*.rst.txt")):
        if any(part in path.parts for part in ("whatsnew", "c-api")) or path.name in (
            "license.rst.txt",
            "changelog.rst.txt",
        ):
            continue
        blocks = re.split(r"\n\s*\n", path.read_text(encoding="utf-8", errors="replace"))
        yield from documents_of("python-doc", (p for p in map(rst_paragraph, blocks) if p))


def rst_paragraph(block: str) -> str:
    """One block of reStructuredText as plain text, or nothing if it is not a plain paragraph."""
    lines = block.split("\n")
    if (
        any(re.match(r"\s*(\.\.|[|+=#*^~\-]{3,}|>>>|:\w+:)", line) for line in lines)
        or "====" in block
        or "``\n" in block
    ):
        return ""
    text = re.sub(r":[\w:+-]+:`!?~?([^`<]*?)(?:\s*<[^`]*>)?`", r"\1", plain(block))
    text = re.sub(r"`([^`<]*?)\s*<[^`]*>`_+", r"\1", text)
    text = re.sub(r"\*(\w[^*]*)\*", r"\1", text)
    text = re.sub(r"\|[\w-]+\|_?", "", text).replace("``", "").replace("**", "").replace("::", ":").replace("`", "")
    return text if is_prose(text) else ""


def is_prose(text: str) -> bool:
    """Whether a paragraph is whole sentences with little else than words."""
    wordy = sum(c.isalpha() or c == " " for c in text) > 0.88 * len(text)
    return wordy and len(text) > 80 and text[0].isupper() and text.endswith((".", ":"))


def postgresql_docs(work: Path) -> Iterator[tuple[str, str]]:
    """Paragraphs of running text in the manual's HTML; the release notes are left out."""
    for path in sorted(work.glob("postgresql-doc-15/usr/share/doc/postgresql-doc-15/html/*.html")):
        if path.name.startswith("release"):
            continue
        found = re.findall(r"<p>(.*?)</p>", path.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
        paragraphs = (plain(html.unescape(re.sub(r"<[^>]*>", "", part))) for part in found)
        yield from documents_of("postgresql-doc", (p for p in paragraphs if is_prose(p)))
