"""Stop strings against a brute-force search in the whole text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpqwen.text.stop import StopMatcher

chars = st.sampled_from("ab\n")
stops_lists = st.lists(st.text(chars, min_size=1, max_size=5), min_size=1, max_size=4)


def cut(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The text up to the first complete stop string, found the slow way."""
    for end in range(1, len(text) + 1):
        found = [s for s in stops if text[:end].endswith(s)]
        if found:
            stop = max(found, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def longest_beginning(text: str, stops: list[str]) -> int:
    """Length of the longest end of text that is a proper beginning of a stop string."""
    return max(k for s in stops for k in range(len(s)) if k == 0 or text.endswith(s[:k]))


@given(parts=st.lists(st.text(chars, max_size=6), max_size=12), stops=stops_lists, include=st.booleans())
@settings(max_examples=400, deadline=None)
def test_any_cutting_gives_the_text_before_the_first_stop(parts: list[str], stops: list[str], include: bool) -> None:
    matcher = StopMatcher(stops, include)
    shown = ""
    given_text = ""
    for part in parts:
        given_text += part
        shown += matcher.feed(part)
        if matcher.matched is None:
            assert len(given_text) - len(shown) == longest_beginning(given_text, stops)
            assert given_text.startswith(shown)
    shown += matcher.flush()
    assert (shown, matcher.matched) == cut("".join(parts), stops, include)


@pytest.mark.parametrize("size", range(1, 9))
def test_stop_in_pieces_of_any_size_never_leaks(size: int) -> None:
    text = "all good STOPWORD leaked"
    matcher = StopMatcher(["STOPWORD"])
    shown = [matcher.feed(text[i : i + size]) for i in range(0, len(text), size)]
    assert "".join(shown) == "all good "
    assert matcher.matched == "STOPWORD"
    assert matcher.flush() == ""


def test_nothing_is_held_when_nothing_can_match() -> None:
    matcher = StopMatcher(["xyz"])
    assert matcher.feed("abc") == "abc"
    assert matcher.feed("x") == ""
    assert matcher.feed("a") == "xa"


def test_long_repetitive_text_takes_linear_time() -> None:
    matcher = StopMatcher(["a" * 255 + "b"])
    shown = sum(len(matcher.feed("a" * 50)) for _ in range(2000))
    assert shown == 100_000 - 255
