"""The parts of an answer (reasoning, content, tool calls), and what is needed to find them as the text comes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from typing import Literal, NamedTuple

Kind = Literal["reasoning", "content", "call", "arguments"]


class Part(NamedTuple):
    """A piece of an answer. Of a `call`, `text` is the function's name; its `arguments` (JSON) follow in pieces."""

    kind: Kind
    text: str


def join_parts(parts: Sequence[Part]) -> list[Part]:
    """The same parts with neighbours of one kind made one; calls stay apart."""
    if len(parts) == 1:
        return [parts[0]] if parts[0].text else []
    out: list[Part] = []
    for kind, group in groupby(parts, key=lambda part: part.kind):
        if kind == "call":
            out += group
        else:
            out.append(Part(kind, "".join(part.text for part in group)))
    return [part for part in out if part.text]


class Markers:
    """Finds the first of some literal markers, and how much of a text's end could still become one."""

    def __init__(self, markers: Sequence[str]) -> None:
        longest_first = sorted(markers, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)))
        self._beginnings = frozenset(marker[:size] for marker in markers for size in range(1, len(marker)))
        self._most_held = len(longest_first[0]) - 1

    def search(self, text: str, start: int = 0) -> re.Match[str] | None:
        return self._pattern.search(text, start)

    def held(self, text: str) -> int:
        """Characters at the end of the text that are the beginning of a marker."""
        for size in range(min(self._most_held, len(text)), 0, -1):
            if text[-size:] in self._beginnings:
                return size
        return 0


class Trimmer:
    """Takes away the blank space around a text that comes in pieces: what may be its end is held back."""

    def __init__(self) -> None:
        self._begun = False
        self._blank: list[str] = []

    def feed(self, text: str) -> str:
        """What is certain to be shown."""
        size = len(text.rstrip())
        if not size:
            self._blank.append(text)
            return ""
        shown = "".join(self._blank) + text[:size]
        self._blank = [text[size:]]
        if not self._begun:
            self._begun = True
            return shown.lstrip()
        return shown

    def rest(self) -> str:
        """The blank space that is held back."""
        blank = "".join(self._blank)
        self._blank = []
        return blank
