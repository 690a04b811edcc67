"""The only importer of xgrammar: structures to compiled grammars, and compiled grammars to token masks.

Compiling happens in the process of compile_worker.py alone; ranks read what it made and never see a schema.
"""

from __future__ import annotations

import json
import re
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import xgrammar

from tpqwen import structure as s
from tpqwen.text.vocabulary import bytes_of_token

CACHED_GRAMMARS = 64  # read ones that a rank keeps
MAX_BYTES = 2 << 20  # of a compiled grammar: ranks stop for as long as they read it, and every queued request holds one
MAX_FILL_S = 0.05  # to fill one mask: ranks stop for as long as that, at every token
TRIAL_TOKENS = 64
_PLACE = re.compile(r"^\[[\d:]+\] \S+: ")  # where xgrammar's source raised it


class GrammarError(ValueError):
    """The structure cannot be compiled; the message is meant for whoever wrote it."""


class Vocabulary:
    """A checkpoint's tokens as xgrammar needs them. Added tokens (control tokens and marks) never match as text."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        """vocab_size: rows of the logits, padding included. Reads tokenizer.json; OSError, ValueError, KeyError."""
        described = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        tokens = [b""] * vocab_size
        for token, token_id in described["model"]["vocab"].items():
            tokens[token_id] = bytes_of_token(token)
        added = {int(t["id"]) for t in described["added_tokens"]}
        for token_id in added:
            tokens[token_id] = b""
        self._any_added = min(added)
        self.num_words = -(-vocab_size // 32)
        # No token ends a text by itself: each matcher names its own.
        self._info = xgrammar.TokenizerInfo(tokens, xgrammar.VocabType.RAW, vocab_size=vocab_size, stop_token_ids=[])
        self._read: OrderedDict[bytes, Any] = OrderedDict()

    def compile(self, structure: s.Structure) -> bytes:
        """The compiled grammar as bytes. Takes as long and as much memory as it takes. Raises GrammarError."""
        compiler = xgrammar.GrammarCompiler(self._info, max_threads=1, cache_enabled=False)
        try:
            compiled = compiler.compile_grammar(_grammar(structure))
        except (RuntimeError, ValueError) as error:  # all that xgrammar raises
            text = _PLACE.sub("", str(error).strip()).partition("\n")[0]
            raise GrammarError(text[:300] or "it cannot be compiled") from None
        data = str(compiled.serialize_json()).encode()
        if len(data) > MAX_BYTES:
            raise GrammarError(f"it is too large: {len(data) >> 20} MiB when compiled, {MAX_BYTES >> 20} are allowed")
        self._try(xgrammar.GrammarMatcher(compiled, override_stop_tokens=[self._any_added]))
        return data

    def _try(self, matcher: Any) -> None:
        """A walk at random through the grammar: some compile quickly and then take seconds for every single token.

        Raises GrammarError.
        """
        random, masks = Random(0), np.zeros((1, self.num_words), np.int32)
        for _ in range(TRIAL_TOKENS):
            begin = time.process_time()
            matcher.fill_next_token_bitmask(masks, 0)
            taken = time.process_time() - begin
            if taken > MAX_FILL_S:
                raise GrammarError(f"it is too expensive to follow: {taken * 1e3:.0f} ms for one token")
            allowed = np.flatnonzero(np.unpackbits(masks.view(np.uint8), bitorder="little"))
            if not allowed.size:
                raise GrammarError("it allows no text at all")
            matcher.accept_token(int(random.choice(allowed)))
            if matcher.is_terminated():
                return

    def matcher(self, compiled: bytes, stop_ids: Sequence[int]) -> Matcher:
        """Follows a grammar from its start. stop_ids may come when it is complete. A few ms the first time."""
        grammar = self._read.pop(compiled, None)
        if grammar is None:
            grammar = xgrammar.CompiledGrammar.deserialize_json(compiled.decode(), self._info)
        self._read[compiled] = grammar
        if len(self._read) > CACHED_GRAMMARS:
            self._read.popitem(last=False)
        return Matcher(xgrammar.GrammarMatcher(grammar, override_stop_tokens=list(stop_ids)))


class Matcher:
    """Where one text stands in its grammar."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def take(self, token_id: int) -> bool:
        """Go on by a token; False, and nothing changes, if the grammar does not allow it here."""
        return bool(self._matcher.accept_token(token_id))

    def fill(self, masks: Any, row: int) -> None:
        """Write the allowed ids into int32 masks [R, num_words] (on the host), bit i % 32 of word i // 32."""
        self._matcher.fill_next_token_bitmask(masks, row)


def _grammar(structure: s.Structure) -> Any:
    grammar = xgrammar.Grammar
    if isinstance(structure, s.Schema):
        return grammar.from_json_schema(structure.text, any_whitespace=False)
    if isinstance(structure, s.Regex):
        return grammar.from_regex(structure.text)
    if isinstance(structure, s.Ebnf):
        return grammar.from_ebnf(structure.text)
    if isinstance(structure, s.Literal):
        return grammar.from_ebnf(f"root ::= {_quoted(structure.text)}")
    if isinstance(structure, s.Without):
        strings = ", ".join(map(_quoted, structure.strings))
        return grammar.from_ebnf(f"root ::= TagDispatch(loop_after_dispatch=false, excludes=({strings}))")
    parts = [_grammar(part) for part in structure.parts]
    join = grammar.concat if isinstance(structure, s.Sequence) else grammar.union
    return join(*parts) if len(parts) > 1 else parts[0]


def _quoted(text: str) -> str:
    """A string literal of xgrammar's EBNF."""
    plain = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c >= " " and c != "\x7f" else f"\\u{ord(c):04x}" for c in plain) + '"'
