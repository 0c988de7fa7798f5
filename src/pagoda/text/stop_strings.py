"""Finds stop strings in text that comes in pieces, in linear time (Aho-Corasick)."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple


class StopMatch(NamedTuple):
    """The stop string that ended a text; `end` counts the characters of the last piece up to its last one."""

    string: str
    end: int


class StopStrings:
    """Walks over a text character by character. The first stop string to be complete wins, the longest of several.

    `held` is how many characters at the end of the text so far could still be the beginning of a stop string.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = strings
        self._next: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._match: list[str | None] = [None]
        self._fallback = [0]
        self._state = 0
        for string in strings:
            self._insert(string)
        self._link()

    def _insert(self, string: str) -> None:
        node = 0
        for char in string:
            if char not in self._next[node]:
                self._next[node][char] = len(self._next)
                self._next.append({})
                self._depth.append(self._depth[node] + 1)
                self._match.append(None)
                self._fallback.append(0)
            node = self._next[node][char]
        self._match[node] = string

    def _link(self) -> None:
        """Each node falls back to the node of its longest proper suffix; breadth first, so that one is done before."""
        queue = deque(self._next[0].values())
        while queue:
            node = queue.popleft()
            for char, child in self._next[node].items():
                self._fallback[child] = self._step(self._fallback[node], char)
                self._match[child] = self._match[child] or self._match[self._fallback[child]]
                queue.append(child)

    def _step(self, node: int, char: str) -> int:
        while node and char not in self._next[node]:
            node = self._fallback[node]
        return self._next[node].get(char, 0)

    @property
    def held(self) -> int:
        return self._depth[self._state]

    def feed(self, piece: str) -> StopMatch | None:
        """Go on over this piece, up to the end of the first stop string that is complete."""
        state = self._state
        for i, char in enumerate(piece):
            state = self._step(state, char)
            if (string := self._match[state]) is not None:
                self._state = state
                return StopMatch(string, i + 1)
        self._state = state
        return None
