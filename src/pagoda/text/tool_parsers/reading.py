"""Reads tool calls character by character with coroutines: one pass, whatever the text and however it is cut."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Mapping
from typing import Any, TypeVar

from pagoda.text.parts import Part

T = TypeVar("T")
Chars = Generator[None, str, T]
"""A coroutine that is sent one character at a time ("" at the end) and gives a T."""

MAX_NAME_CHARS = 256
_BLANK = " \t\r\n"


class Malformed(Exception):
    """This is not a tool call; the character that was sent last has not been used."""


class Calls:
    """Where readers write the calls that they find, with what is known of the functions."""

    def __init__(self, schemas: Mapping[str, Mapping[str, Any]]) -> None:
        self.schemas = schemas
        self.count = 0
        self.writes = 0
        self._parts: list[Part] = []
        self._arguments: list[str] = []

    @property
    def names(self) -> Collection[str]:
        return self.schemas.keys()

    def begin(self, name: str) -> None:
        """A further call; a name that no function can have is Malformed."""
        if not name or len(name) > MAX_NAME_CHARS or not name.isprintable() or " " in name:
            raise Malformed
        self._flush()
        self._parts.append(Part("call", name))
        self.count += 1
        self.writes += 1

    def arguments(self, text: str) -> None:
        """A further piece of the last call's arguments."""
        self._arguments.append(text)
        self.writes += 1

    def settle(self) -> None:
        """All characters so far have had their use: none of them will be content."""
        self.writes += 1

    def take(self) -> list[Part]:
        """What was written since this was last asked."""
        self._flush()
        parts, self._parts = self._parts, []
        return parts

    def _flush(self) -> None:
        if self._arguments:
            self._parts.append(Part("arguments", "".join(self._arguments)))
            self._arguments = []


Reader = Callable[[Calls], Chars[None]]


def one() -> Chars[str]:
    """The next character."""
    char = yield
    if not char:
        raise Malformed
    return char


def next_visible() -> Chars[str]:
    """The next character that is no blank space."""
    while True:
        char = yield from one()
        if char not in _BLANK:
            return char


def expect(text: str, given: str = "") -> Chars[None]:
    """These characters and no others; `given` was read before."""
    if not text.startswith(given):
        raise Malformed
    for wanted in text[len(given) :]:
        char = yield from one()
        if char != wanted:
            raise Malformed


def until(mark: str, *, limit: int | None = MAX_NAME_CHARS) -> Chars[str]:
    """The text before this mark."""
    read: list[str] = []
    size, last = len(mark), mark[-1]
    while True:
        char = yield from one()
        read.append(char)
        if char == last and len(read) >= size and "".join(read[-size:]) == mark:
            return "".join(read[:-size])
        if limit is not None and len(read) > limit + size:
            raise Malformed


def json_string() -> Chars[str]:
    """The rest of a string of JSON behind its first quote, as it is written there."""
    read: list[str] = []
    while True:
        char = yield from one()
        if char == '"':
            return "".join(read)
        read.append(char)
        if char == "\\":
            read.append((yield from one()))


def json_nested(first: str, write: Callable[[str], None]) -> Chars[None]:
    """An object or a list whose first bracket was read; writes all of it."""
    write(first)
    depth, quoted = 1, False
    while depth:
        char = yield
        if not char:
            raise Malformed
        write(char)
        if quoted:
            if char == '"':
                quoted = False
            elif char == "\\":
                write((yield from one()))
        elif char == '"':
            quoted = True
        elif char in "{[":
            depth += 1
        elif char in "}]":
            depth -= 1
