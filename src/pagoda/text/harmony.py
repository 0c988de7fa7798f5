"""Reads gpt-oss's messages: each has a header that says its channel and whom it is for, then a body."""

from __future__ import annotations

import re

from pagoda.text.parts import Kind, Markers, Part

MARKS = ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>")
ENDS = ("<|return|>", "<|call|>")
"""What an answer ends with: its last message, or a call."""

_MESSAGE = "<|message|>"
_HEADER_WORDS = ("<", "assistant", "to=")
_MAX_HEADER_CHARS = 512
_CHANNEL = re.compile(r"<\|channel\|>\s?([a-z]+)")
_FUNCTION = re.compile(r"to=functions\.([^\s<]+)")


class Harmony:
    """Analysis is reasoning, what is for a function is a call of it, all else is content."""

    def __init__(self, *, tools: bool) -> None:
        self._tools = tools
        self._body_ends = Markers(("<|start|>", "<|channel|>", "<|end|>", "<|call|>", "<|return|>"))
        self._header_ends = Markers((_MESSAGE,))
        self._buffer = ""
        self._kind: Kind | None = None  # of the body that is being read; None in a header
        self._empty = False

    @property
    def settled(self) -> bool:
        """Never: another message of any channel may follow."""
        return False

    @property
    def thinking(self) -> bool:
        return self._kind == "reasoning"

    def feed(self, text: str) -> list[Part]:
        """What of the answer is certain with this further text."""
        self._buffer += text
        parts: list[Part] = []
        while self._buffer and (self._header(parts) if self._kind is None else self._body(self._kind, parts)):
            pass
        return parts

    def finish(self) -> list[Part]:
        """What was held back when the answer ended."""
        rest, self._buffer = self._buffer, ""
        if self._kind is None:
            return [] if rest.startswith("<|") or not rest.strip() else [Part("content", rest)]
        return [Part(self._kind, rest), *self._close()]

    def _header(self, parts: list[Part]) -> bool:
        found = self._header_ends.search(self._buffer)
        if found is not None:
            self._begin(self._buffer[: found.start()], parts)
            self._buffer = self._buffer[found.end() :]
            return True
        text = self._buffer.lstrip()
        plain = text and not any(text.startswith(word) or word.startswith(text) for word in _HEADER_WORDS)
        if plain:
            self._kind = "content"  # a message without a header
        elif len(self._buffer) > _MAX_HEADER_CHARS:
            parts.append(Part("content", self._buffer))
            self._buffer = ""
        return bool(plain)

    def _begin(self, header: str, parts: list[Part]) -> None:
        function = _FUNCTION.search(header)
        if function is not None and self._tools:
            parts.append(Part("call", function[1]))
            self._kind, self._empty = "arguments", True
            return
        channel = _CHANNEL.search(header)
        self._kind = "reasoning" if channel is not None and channel[1] == "analysis" else "content"

    def _body(self, kind: Kind, parts: list[Part]) -> bool:
        found = self._body_ends.search(self._buffer)
        cut = len(self._buffer) - self._body_ends.held(self._buffer) if found is None else found.start()
        text, self._buffer = self._buffer[:cut], self._buffer[cut:]
        if text.strip():
            self._empty = False
        parts.append(Part(kind, text))
        if found is None:
            return False
        parts += self._close()
        if found[0] not in ("<|start|>", "<|channel|>"):
            self._buffer = self._buffer[len(found[0]) :]
        self._kind = None
        return True

    def _close(self) -> list[Part]:
        return [Part("arguments", "{}")] if self._kind == "arguments" and self._empty else []
