"""Stop strings matched on streamed text, wherever the token borders fall."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Passes text on and ends at the first stop string to be complete; of several at one place, at the longest.

    Nothing of a stop string ever leaves (with include=True the whole of it does), and what is held back is never more
    than the longest end of the text that begins a stop string. Knuth-Morris-Pratt, one state per string: linear time.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self.stops = tuple(stops)
        self.matched: str | None = None
        self._include = include
        self._firsts = tuple({s[0] for s in self.stops})
        self._borders = [_borders(s) for s in self.stops]
        self._states = [0] * len(self.stops)
        self._held = ""

    def feed(self, text: str) -> str:
        """The text that may be shown now. After a match: `matched` is set and nothing more comes."""
        if self.matched is not None:
            return ""
        if not self._held and not any(c in text for c in self._firsts):
            return text
        start, text = len(self._held), self._held + text
        for end in range(start + 1, len(text) + 1):
            stop = self._advance(text[end - 1])
            if stop is not None:
                self.matched, self._held = stop, ""
                return text[: end if self._include else end - len(stop)]
        safe = len(text) - max(self._states)
        self._held = text[safe:]
        return text[:safe]

    def flush(self) -> str:
        """The held text, when the output ends without a match."""
        held, self._held = self._held, ""
        return held

    def _advance(self, char: str) -> str | None:
        """Take one character into every state; the longest stop string that it completes."""
        found: str | None = None
        for i, stop in enumerate(self.stops):
            state, borders = self._states[i], self._borders[i]
            while state and stop[state] != char:
                state = borders[state - 1]
            if stop[state] == char:
                state += 1
            if state == len(stop):
                found = stop if found is None or len(stop) > len(found) else found
                state = borders[state - 1]
            self._states[i] = state
        return found


def _borders(word: str) -> list[int]:
    """For each prefix of word the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(word)
    length = 0
    for i in range(1, len(word)):
        while length and word[i] != word[length]:
            length = borders[length - 1]
        if word[i] == word[length]:
            length += 1
        borders[i] = length
    return borders
