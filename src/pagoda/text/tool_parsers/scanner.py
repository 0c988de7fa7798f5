"""Finds tool calls among an answer's content and gives both, piece by piece, as the text comes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pagoda.text.parts import Markers, Part, Trimmer
from pagoda.text.tool_parsers.reading import Calls, Chars, Malformed, Reader


class CallScanner:
    """`blocks`: the mark before a call and how the call is read. `bare`: how an answer that is nothing but calls is.

    `noise` are marks around calls; closing tags are so only once there has been a call. What turns out not to be a
    call is content. Blank space around the content of an answer with calls is left out.
    """

    def __init__(
        self,
        blocks: Mapping[str, Reader],
        schemas: Mapping[str, Mapping[str, Any]],
        *,
        noise: Sequence[str] = (),
        bare: Reader | None = None,
    ) -> None:
        self._blocks = blocks
        self._calls = Calls(schemas)
        self._markers = Markers((*blocks, *noise)) if blocks or noise else None
        self._parts: list[Part] = []
        self._content = Trimmer()
        self._buffer = ""
        self._raw: list[str] = []  # what the reader has used since it last wrote something
        self._block: Chars[None] | None = None
        if bare is not None:
            self._open(bare)

    def feed(self, text: str) -> list[Part]:
        """What of the answer is certain with this further text."""
        text, self._buffer = self._buffer + text, ""
        position = 0
        while position < len(text):
            if self._block is not None:
                position = self._read(self._block, text, position)
            else:
                position = self._search(text, position)
        return self._take()

    def finish(self) -> list[Part]:
        """What was held back when the answer ended."""
        if self._block is not None:
            self._read(self._block, ("",), 0)
        if not (self._calls.count and self._buffer.startswith("</")):  # a closing tag that was cut off
            self._show(self._buffer)
        self._buffer = ""
        if not self._calls.count:
            self._parts.append(Part("content", self._content.rest()))
        return self._take()

    def _take(self) -> list[Part]:
        parts = self._parts + self._calls.take()
        self._parts = []
        return parts

    def _show(self, text: str) -> None:
        if shown := self._content.feed(text) if text else "":
            self._parts += [*self._calls.take(), Part("content", shown)]

    def _search(self, text: str, start: int) -> int:
        """Content up to the next mark; gives the position behind it."""
        if self._markers is None:
            self._show(text[start:])
            return len(text)
        found = self._markers.search(text, start)
        if found is None:
            end = len(text) - self._markers.held(text[start:])
            self._show(text[start:end])
            self._buffer = text[end:]
            return len(text)
        self._show(text[start : found.start()])
        mark = found[0]
        if mark in self._blocks:
            self._raw = [mark]
            self._open(self._blocks[mark])
        elif not self._calls.count and mark.startswith("</"):
            self._show(mark)
        return found.end()

    def _open(self, reader: Reader) -> None:
        self._block = reader(self._calls)
        next(self._block)

    def _read(self, block: Chars[None], text: Sequence[str], start: int) -> int:
        """Send characters until the call is over; gives the position of the first that is not part of it."""
        for position in range(start, len(text)):
            writes = self._calls.writes
            try:
                block.send(text[position])
            except StopIteration:
                self._block, self._raw = None, []
                return position + 1
            except Malformed:
                raw, self._block, self._raw = "".join(self._raw), None, []
                self._show(raw)
                return position
            if self._calls.writes == writes:
                self._raw.append(text[position])
            else:
                self._raw.clear()
        return len(text)
