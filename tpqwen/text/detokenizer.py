"""Token ids to text one at a time, never showing half a character."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from tpqwen.text.vocabulary import Vocabulary

_utf8 = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """Pieces of text whose concatenation, `flush` included, equals decoding all ids at once, for any ids.

    A token of byte-level BPE is a string of bytes, so the state is at most three bytes of an unfinished character.
    Bytes that can't become a character turn into U+FFFD, as in the tokenizer's own decoder. Under 1 us a token.
    """

    def __init__(self, vocabulary: Vocabulary, skip_special_tokens: bool = True) -> None:
        self._vocabulary = vocabulary
        self._hidden = vocabulary.special_ids if skip_special_tokens else frozenset()
        self._decoder = _utf8("replace")

    def feed(self, token_id: int) -> str:
        """The text that is certain after this token; may be empty."""
        if token_id in self._hidden:
            return ""
        return self._decoder.decode(self._vocabulary.bytes_of(token_id))

    def feed_all(self, token_ids: Sequence[int]) -> str:
        """The text that is certain after these tokens: what `feed` gives for each, joined."""
        bytes_of, hidden = self._vocabulary.bytes_of, self._hidden
        return self._decoder.decode(b"".join([bytes_of(i) for i in token_ids if i not in hidden]))

    def flush(self) -> str:
        """What is held back, as U+FFFD; call it once, at the end of the text."""
        return self._decoder.decode(b"", final=True)
