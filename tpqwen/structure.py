"""What an output must look like, as data: built where requests are read, compiled in a process of its own."""

from __future__ import annotations

from typing import Protocol

import msgspec


class Literal(msgspec.Struct, frozen=True, tag="literal"):
    """Exactly this text."""

    text: str


class Schema(msgspec.Struct, frozen=True, tag="schema"):
    """One JSON value on one line, as json.dumps writes it, under a JSON schema (itself as JSON text)."""

    text: str


class Regex(msgspec.Struct, frozen=True, tag="regex"):
    """Text that the regular expression matches as a whole."""

    text: str


class Ebnf(msgspec.Struct, frozen=True, tag="ebnf"):
    """Text that the grammar's rule `root` derives."""

    text: str


class Without(msgspec.Struct, frozen=True, tag="without"):
    """Any text, also none, in which none of these strings stands."""

    strings: tuple[str, ...]


class Sequence(msgspec.Struct, frozen=True, tag="sequence"):
    """One part after the other."""

    parts: tuple[Structure, ...]


class Choice(msgspec.Struct, frozen=True, tag="choice"):
    """One of the parts."""

    parts: tuple[Structure, ...]


Structure = Literal | Schema | Regex | Ebnf | Without | Sequence | Choice


class Job(msgspec.Struct, frozen=True, array_like=True):
    """One structure to compile. timeout_s of wall clock and of CPU; memory_bytes more than the idle process has."""

    structure: Structure
    timeout_s: float
    memory_bytes: int


class Done(msgspec.Struct, frozen=True, array_like=True):
    """What became of it: the compiled grammar, or why there is none."""

    compiled: bytes = b""
    error: str = ""


encode = msgspec.msgpack.Encoder().encode
decode_job = msgspec.msgpack.Decoder(Job).decode
decode_done = msgspec.msgpack.Decoder(Done).decode


class Compiler(Protocol):
    """Turns a structure into what ranks can follow."""

    async def compile(self, structure: Structure, param: str) -> bytes:
        """The compiled grammar. Raises RequestError naming `param`, Overloaded when too many wait."""
