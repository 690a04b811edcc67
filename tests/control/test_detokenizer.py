"""Incremental text equals the tokenizer's own decoding of everything at once, for any ids."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.text_fixture import tokenizer
from tpqwen.text.detokenizer import Detokenizer
from tpqwen.text.vocabulary import bytes_of_token

VOCABULARY = tokenizer().vocabulary
any_ids = st.lists(st.integers(0, VOCABULARY.size + 20), max_size=60)
byte_ids = st.lists(
    st.sampled_from([i for i, b in enumerate(VOCABULARY.token_bytes) if b and b[0] >= 0x80]), max_size=40
)


def pieces(token_ids: list[int], skip_special_tokens: bool = True) -> list[str]:
    detokenizer = Detokenizer(VOCABULARY, skip_special_tokens)
    return [*map(detokenizer.feed, token_ids), detokenizer.flush()]


@given(token_ids=any_ids | byte_ids, skip=st.booleans())
@settings(max_examples=200, deadline=None)
def test_pieces_add_up_to_the_whole_for_any_ids(token_ids: list[int], skip: bool) -> None:
    assert "".join(pieces(token_ids, skip)) == tokenizer().decode(token_ids, skip_special_tokens=skip)


@given(text=st.text(max_size=40))
@settings(max_examples=80, deadline=None)
def test_text_survives_the_way_through_ids(text: str) -> None:
    token_ids = tokenizer().encode_plain(text)
    assert "".join(pieces(token_ids)) == tokenizer().decode(token_ids)


@pytest.mark.parametrize("text", ["日本語 文字", "👩‍👩‍👧‍👦", "🇩🇪🇫🇷", "한국어 각", "naïve e\u0301", "\x00\x7f", "ﷺ"])
def test_half_characters_are_never_shown(text: str) -> None:
    token_ids = [i for b in text.encode() for i in [VOCABULARY.token_bytes.index(bytes([b]))]]
    shown = pieces(token_ids)
    assert "".join(shown) == text
    assert "\ufffd" not in "".join(shown)


def test_broken_bytes_become_replacement_characters() -> None:
    first, second, *_ = (VOCABULARY.token_bytes.index(bytes([b])) for b in "日".encode())
    assert pieces([first, second]) == ["", "", "\ufffd"]
    assert pieces([first, *tokenizer().encode("a")]) == ["", "\ufffda", ""]


def test_padding_ids_have_no_text() -> None:
    assert pieces([VOCABULARY.size, VOCABULARY.size + 5, -1]) == ["", "", "", ""]


def test_added_tokens_outside_the_byte_alphabet_are_their_own_text() -> None:
    assert bytes_of_token("Ġthe") == b" the"
    assert bytes_of_token("<a b>") == b"<a b>"
