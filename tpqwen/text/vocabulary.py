"""What the text layer knows of a tokenizer without importing one: bytes of each token, ids of control tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"
TURN_START = "<|im_start|>"
CALL_OPEN = "<tool_call>"
CALL_CLOSE = "</tool_call>"


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE's character for each byte (GPT-2's table): printable bytes stand for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_ALPHABET = _byte_alphabet()


def bytes_of_token(token: str) -> bytes:
    """The bytes that a byte-level token stands for; a token outside the alphabet (an added one) is its own UTF-8."""
    values = [_ALPHABET.get(c, -1) for c in token]
    return token.encode() if -1 in values else bytes(values)


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id. token_bytes[i] is empty where no token has the id; ids beyond the list are padding.

    special_ids are what skip_special_tokens hides. control maps the text of every added token to its id.
    """

    token_bytes: Sequence[bytes]
    special_ids: frozenset[int]
    control: Mapping[str, int]

    @property
    def size(self) -> int:
        return len(self.token_bytes)

    @property
    def think_open(self) -> int | None:
        return self.control.get(THINK_OPEN)

    @property
    def think_close(self) -> int | None:
        return self.control.get(THINK_CLOSE)

    @property
    def turn_start(self) -> int | None:
        return self.control.get(TURN_START)

    @cached_property
    def newline_id(self) -> int | None:
        """The token that is one newline."""
        return next((i for i, token in enumerate(self.token_bytes) if token == b"\n"), None)

    @cached_property
    def blank_ids(self) -> tuple[int, ...]:
        """Tokens that are one empty line: what Qwen3 writes after its reasoning."""
        return tuple(i for i, token in enumerate(self.token_bytes) if token == b"\n\n")

    def bytes_of(self, token_id: int) -> bytes:
        """Bytes of one token, empty for a padding id."""
        return self.token_bytes[token_id] if 0 <= token_id < len(self.token_bytes) else b""


class TextModel(Protocol):
    """A tokenizer with a chat template; text.tokenizer.Tokenizer is the real one."""

    @property
    def vocabulary(self) -> Vocabulary:
        """Its tokens."""

    @property
    def chat_template(self) -> str | None:
        """The template's source, None for a model without chat."""

    def encode(self, text: str) -> list[int]:
        """Ids of text; control tokens written in it become their ids. Nothing is added."""

    def encode_plain(self, text: str) -> list[int]:
        """Ids of text in which nothing is a control token."""

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ids."""

    def render(self, messages: list[dict[str, Any]], **options: Any) -> str:
        """The chat template applied, generation prompt included. Raises RequestError when the template refuses."""
