"""Ends an answer at a stop string, wherever token borders fall."""

from collections.abc import Sequence


class StopStringDetector:
    """Passes text on until a stop string is complete; holds back what may still become one.

    The match that is complete first wins, and of those that end together the longest. The result does not
    depend on how the text is cut into pieces.

    Args:
        stops: no empty strings.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops)
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None
        """The stop string that ended the text."""
        self.num_withheld = 0
        """Characters at the end of what was pushed that were not passed on: from the stop string on, or what may
        still become one."""

    def push(self, text: str) -> str:
        """Text that is certainly before any stop string. Nothing more may be pushed after a match."""
        assert self.matched is None
        if not self._stops:
            return text
        buffer = self._held + text
        matches = [(start + len(stop), start, stop) for stop in self._stops if (start := buffer.find(stop)) >= 0]
        if matches:
            _, start, self.matched = min(matches)
            self._held = ""
            self.num_withheld = len(buffer) - start
            return buffer[:start]
        keep = min(possible_start(buffer, stop) for stop in self._stops)
        self._held = buffer[keep:]
        self.num_withheld = len(buffer) - keep
        return buffer[:keep]

    def flush(self) -> str:
        """The text held back, when nothing follows."""
        held, self._held = self._held, ""
        self.num_withheld = 0
        return held


def possible_start(text: str, mark: str) -> int:
    """Where the longest end of a text begins that is a beginning of the mark, and not all of it; else the text's
    length."""
    start = text.find(mark[0], max(0, len(text) - len(mark) + 1))
    while start >= 0:
        if mark.startswith(text[start:]):
            return start
        start = text.find(mark[0], start + 1)
    return len(text)
