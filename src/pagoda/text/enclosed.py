"""An answer without the marks that its family writes around it, and without the blank space beside them."""

from __future__ import annotations

from collections.abc import Sequence

from pagoda.text.parts import Markers, Trimmer

_MAX_BLANK_CHARS = 64


class Enclosed:
    """The answer comes in pieces. What looks like a mark in the middle of it is text.

    `marks` are the first and the last. `calls` are those that a tool call may begin with: the answer ends before them,
    too, and what comes then is shown as it is. A last mark with more blank space behind it than a line or two is text.
    """

    def __init__(self, marks: tuple[str, str], calls: Sequence[str] = ()) -> None:
        self._first, self._last = marks
        self._calls = tuple(calls)
        self._ends = Markers((self._last,))
        self._look_ahead = _MAX_BLANK_CHARS + 1 + max(map(len, self._calls), default=0)
        self._trimmer = Trimmer()
        self._buffer = ""
        self._step = self._before

    def feed(self, text: str) -> str:
        """What of the answer is certain with this further text."""
        self._buffer += text
        return self._step()

    def finish(self) -> str:
        """What was held back when the answer ended."""
        rest, self._buffer = self._buffer, ""
        if self._step != self._inside:
            return rest
        return "" if rest.rstrip() == self._last else self._trimmer.feed(rest)

    def _before(self) -> str:
        text = self._buffer.lstrip()
        near = len(self._buffer) - len(text) <= _MAX_BLANK_CHARS
        if near and text.startswith(self._first):
            self._buffer = text[len(self._first) :]
            self._step = self._inside
        elif near and self._first.startswith(text):
            return ""
        else:
            self._step = self._as_it_is
        return self._step()

    def _inside(self) -> str:
        text, begin, end = self._buffer, 0, -1
        while end < 0 and (found := self._ends.search(text, begin)):
            begin = found.end()
            if self._ends_at(begin):
                end = found.start()
        if end < 0:
            end = len(text) - self._ends.held(text[begin:])
        self._buffer = text[end:]
        shown = self._trimmer.feed(text[:end])
        behind = self._buffer[len(self._last) :].lstrip()
        if behind.startswith(self._calls):
            self._buffer, self._step = behind, self._as_it_is
            return shown + self._as_it_is()
        return shown

    def _ends_at(self, place: int) -> bool:
        """Whether the mark that ends here may be the last: nothing is behind it yet, or what begins a call."""
        ahead = self._buffer[place : place + self._look_ahead]
        behind = ahead.lstrip()
        if not behind:
            return len(ahead) <= _MAX_BLANK_CHARS
        return any(call.startswith(behind) or behind.startswith(call) for call in self._calls)

    def _as_it_is(self) -> str:
        text, self._buffer = self._buffer, ""
        return text
