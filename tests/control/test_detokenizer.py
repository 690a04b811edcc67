"""Incremental text equals the tokenizer's own decoding of everything at once, for any ids."""

from __future__ import annotations

import time
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.text_fixture import tokenizer
from tpqwen.config import EMBEDDED_MODEL
from tpqwen.text.detokenizer import Detokenizer
from tpqwen.text.tokenizer import Tokenizer
from tpqwen.text.vocabulary import bytes_of_token

VOCABULARY = tokenizer().vocabulary
any_ids = st.lists(st.integers(0, VOCABULARY.size + 20), max_size=60)
byte_ids = st.lists(
    st.sampled_from([i for i, b in enumerate(VOCABULARY.token_bytes) if b and b[0] >= 0x80]), max_size=40
)


CORPUS = {
    "CJK": "日本語の文字、漢字かな交じり文。中文句子，標點符號。한국어 각각 ㄱㅏ",
    "CJK beyond the BMP": "𠮷野家 𡈽 𪚥",
    "emoji with joiners": "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🧑🏿‍🚀 ❤️‍🔥 🇩🇪🇫🇷 1️⃣",
    "combining marks": "e\u0301 a\u0308\u0304 ก็ที่ क्षि ﷺ Z̷̨͎a̸̻l̵g̶o",
    "right to left": "שָׁלוֹם עֲלֵיכֶם مرحبًا بالعالم \u202eabc\u202c",
    "controls": "\x00\x07\x1b[0m\x7f\u0085\u200b\ufeff\u2028",
    "the replacement character itself": "a\ufffdb\ufffd",
    "mathematics": "𝔸𝕓 ∑∫ ℝ⊂ℂ ½ ²",
}


@cache
def embedded() -> Tokenizer:
    return Tokenizer(EMBEDDED_MODEL)


def pieces(token_ids: list[int], skip_special_tokens: bool = True) -> list[str]:
    detokenizer = Detokenizer(VOCABULARY, skip_special_tokens)
    return [*map(detokenizer.feed, token_ids), detokenizer.flush()]


@given(token_ids=any_ids | byte_ids, skip=st.booleans())
@settings(max_examples=200, deadline=None)
def test_pieces_add_up_to_the_whole_for_any_ids(token_ids: list[int], skip: bool) -> None:
    whole = tokenizer().decode(token_ids, skip_special_tokens=skip)
    assert "".join(pieces(token_ids, skip)) == whole
    for size in (1, 3, 100):
        detokenizer = Detokenizer(VOCABULARY, skip)
        together = [detokenizer.feed_all(token_ids[i : i + size]) for i in range(0, len(token_ids), size)]
        assert "".join([*together, detokenizer.flush()]) == whole


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


def shown_of(token_ids: list[int], model: Tokenizer) -> list[str]:
    """The text after each token; asserts that the end equals the whole and that nothing shown was wrong."""
    detokenizer = Detokenizer(model.vocabulary)
    parts = [*map(detokenizer.feed, token_ids), detokenizer.flush()]
    whole = model.decode(token_ids)
    assert "".join(parts) == whole
    shown = ["".join(parts[: i + 1]) for i in range(len(parts))]
    assert all(whole.startswith(s) for s in shown)
    return shown


@pytest.mark.parametrize("name", CORPUS)
def test_corpus_is_shown_character_by_character_however_it_is_cut_into_tokens(name: str) -> None:
    text = CORPUS[name]
    for model in (tokenizer(), embedded()):
        plain = model.decode(model.encode_plain(text))  # normalised as the tokenizer does
        bytewise = [model.vocabulary.token_bytes.index(bytes([b])) for b in plain.encode()]
        for ids in (model.encode_plain(text), bytewise):
            shown = shown_of(ids, model)
            assert shown[-1] == plain
            # never a character that a later token completes: what is shown is what is complete, no less either
            done = b""
            for i, token_id in enumerate(ids):
                done += model.vocabulary.bytes_of(token_id)
                complete = done.decode("utf-8", "ignore") if not done.endswith(b"\xef\xbf\xbd") else done.decode()
                assert shown[i] == complete


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_ids_of_the_embedded_tokenizer(data: st.DataObject) -> None:
    vocabulary = embedded().vocabulary
    high = [i for i, b in enumerate(vocabulary.token_bytes) if b and b[0] >= 0x80]
    ids = data.draw(st.lists(st.integers(0, vocabulary.size) | st.sampled_from(high), max_size=50))
    shown_of(ids, embedded())


def test_a_token_costs_microseconds() -> None:
    ids = embedded().encode_plain(" ".join(CORPUS.values()) + " plain English words as well") * 40
    costs = []
    while not costs or (min(costs) > 5e-6 and len(costs) < 5):  # others compute on this machine too
        detokenizer = Detokenizer(embedded().vocabulary)
        begin = time.process_time()
        for token_id in ids:
            detokenizer.feed(token_id)
        costs.append((time.process_time() - begin) / len(ids))
    assert min(costs) < 5e-6


def test_broken_bytes_become_replacement_characters() -> None:
    first, second, *_ = (VOCABULARY.token_bytes.index(bytes([b])) for b in "日".encode())
    assert pieces([first, second]) == ["", "", "\ufffd"]
    assert pieces([first, *tokenizer().encode("a")]) == ["", "\ufffda", ""]


def test_padding_ids_have_no_text() -> None:
    assert pieces([VOCABULARY.size, VOCABULARY.size + 5, -1]) == ["", "", "", ""]


def test_added_tokens_outside_the_byte_alphabet_are_their_own_text() -> None:
    assert bytes_of_token("Ġthe") == b" the"
    assert bytes_of_token("<a b>") == b"<a b>"
