"""Regular expressions that xgrammar follows to the letter. What it would overlook or misread is refused.

It takes look-around for nothing, inner anchors too, a hexadecimal escape and the letters after it for one character,
and a dot for a newline as well; in a JSON string it writes some characters as they are that must be escaped. All of
it was found by drawing texts from its masks.
"""

from __future__ import annotations

import re
from typing import NoReturn

from tpqwen.errors import RequestError

_CLASS = r"\[(?:\\.|[^\]\\])*\]"
_PARTS = re.compile(rf"{_CLASS}|\\u[0-9A-Fa-f]{{4}}|\\.|\(\?:|.", re.DOTALL)
_ESCAPES = re.compile(r"\\(u[0-9A-Fa-f]{4}|.)", re.DOTALL)
_CLASS_LETTERS = frozenset("dDwWsS")
_CONTROL_LETTERS = frozenset("nrtfv")


def check_json_pattern(pattern: object, where: str) -> None:
    """A pattern of a JSON schema. Raises RequestError when it cannot be enforced on the text of a JSON string."""
    if not isinstance(pattern, str):
        _refuse(where, "must be a string")
    for part in _checked_parts(pattern, where):
        if '"' in part or any(c < " " for c in part):
            _refuse(where, "quotation marks and control characters cannot be enforced in a pattern")
        for escape in _ESCAPES.findall(part):
            if not _fits_json(escape, part):
                _refuse(where, f"\\{escape} cannot be enforced")


def checked_regex(pattern: str, where: str) -> str:
    """A regular expression for plain text, in the form that means the same to xgrammar. Raises RequestError."""
    parts = _checked_parts(pattern, where)
    return "".join(r"[^\n]" if part == "." else part for part in parts)


def _checked_parts(pattern: str, where: str) -> list[str]:
    """The pattern cut into classes, escapes and single characters."""
    parts = _PARTS.findall(pattern)
    for before, part, after in zip(["", *parts], parts, [*parts[1:], ""], strict=False):
        if part == "(" and after == "?":
            _refuse(where, "groups other than (...) and (?:...) cannot be enforced")
        if part == "+" and before in ("*", "+", "?", "}"):
            _refuse(where, "possessive repetition cannot be enforced")
        if (part == "^" and before not in ("", "(", "(?:", "|")) or (part == "$" and after not in ("", ")", "|")):
            _refuse(where, f"{part} can be enforced only at the ends")
        for escape in _ESCAPES.findall(part):
            if len(escape) == 1 and escape.isalnum() and escape not in _CLASS_LETTERS | _CONTROL_LETTERS:
                _refuse(where, f"\\{escape} cannot be enforced")
    return parts


def _fits_json(escape: str, part: str) -> bool:
    """Whether the characters of an escape can stand in a JSON string as they are."""
    if len(escape) == 5:
        return int(escape[1:], 16) >= 0x20 and chr(int(escape[1:], 16)) not in '"\\'
    if escape == "\\":  # in a class it is written escaped, alone it is not
        return part.startswith("[")
    return escape not in _CONTROL_LETTERS or part.startswith("[^")


def _refuse(where: str, message: str) -> NoReturn:
    raise RequestError(f"{where}: {message}", param=where, code="unsupported_schema")
