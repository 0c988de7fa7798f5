"""Tool calls written as Python: `[f(a=1, b="x"), g()]`; nothing is evaluated, literals are read one by one."""

from __future__ import annotations

import math

import msgspec

from pagoda.text.tool_parsers.reading import MAX_NAME_CHARS, Calls, Chars, Malformed, next_visible, one

WORDS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "0": "\0", "\n": ""}
_HEX = {"x": 2, "u": 4, "U": 8}
_CLOSING = {"[": "]", "(": ")", "{": "}"}
MAX_DEPTH = 32


def pythonic_calls(calls: Calls) -> Chars[None]:
    """A list of calls with keyword arguments. Each is written when it is complete; only known functions are calls."""
    if (yield from next_visible()) != "[":
        raise Malformed
    char = yield from next_visible()
    while True:
        name, char = yield from identifier(char, also=".-")
        if char != "(" or name not in calls.names:
            raise Malformed
        arguments = yield from _keywords()
        calls.begin(name)
        calls.arguments(arguments)
        char = yield from next_visible()
        if char == "]":
            return
        if char != ",":
            raise Malformed
        char = yield from next_visible()


def _keywords() -> Chars[str]:
    """Arguments up to the closing bracket, as an object of JSON."""
    items: list[str] = []
    char = yield from next_visible()
    while char != ")":
        key, char = yield from identifier(char)
        if char != "=":
            raise Malformed
        value, char = yield from _literal((yield from next_visible()), 0)
        items.append(f'"{key}": {value}')
        char = yield from after_item(char, ")")
    return "{" + ", ".join(items) + "}"


def after_item(char: str, closing: str) -> Chars[str]:
    """The beginning of the next item, or the closing bracket."""
    if char == ",":
        return (yield from next_visible())
    if char != closing:
        raise Malformed
    return char


def identifier(first: str, also: str = "") -> Chars[tuple[str, str]]:
    """An identifier, and the visible character behind it."""
    read: list[str] = []
    char = first
    while char.isalnum() or char == "_" or char in also:
        read.append(char)
        if len(read) > MAX_NAME_CHARS:
            raise Malformed
        char = yield from one()
    if not read:
        raise Malformed
    if char.isspace():
        char = yield from next_visible()
    return "".join(read), char


def _literal(first: str, depth: int) -> Chars[tuple[str, str]]:
    """A literal as JSON, and the visible character behind it."""
    if depth > MAX_DEPTH:
        raise Malformed
    if first in "\"'":
        text = yield from _string(first)
        return text, (yield from next_visible())
    if first in _CLOSING:
        text = yield from _nested(first, depth)
        return text, (yield from next_visible())
    word, char = yield from identifier(first, also="+-.")
    return WORDS.get(word) or number(word), char


def number(word: str) -> str:
    try:
        number = float(word) if any(char in word for char in ".eEinf") else int(word)
        if not math.isfinite(number):
            raise Malformed
        return msgspec.json.encode(number).decode() if isinstance(number, float) else str(number)
    except (ValueError, OverflowError):
        raise Malformed from None


def _string(quote: str) -> Chars[str]:
    read: list[str] = []
    while True:
        char = yield from one()
        if char == quote:
            break
        read.append((yield from _escape()) if char == "\\" else char)
    try:
        return msgspec.json.encode("".join(read)).decode()
    except UnicodeError:
        raise Malformed from None


def _escape() -> Chars[str]:
    char = yield from one()
    if char not in _HEX:
        return _ESCAPES.get(char, char if char in "\\'\"" else "\\" + char)
    digits: list[str] = []
    for _ in range(_HEX[char]):
        digits.append((yield from one()))
    try:
        return chr(int("".join(digits), 16))
    except (ValueError, OverflowError):
        raise Malformed from None


def _nested(opening: str, depth: int) -> Chars[str]:
    """A list, a tuple or a dict as JSON."""
    closing = _CLOSING[opening]
    items: list[str] = []
    char = yield from next_visible()
    while char != closing:
        item, char = yield from _literal(char, depth + 1)
        if opening == "{":
            if char != ":" or not item.startswith('"'):
                raise Malformed
            value, char = yield from _literal((yield from next_visible()), depth + 1)
            item = f"{item}: {value}"
        items.append(item)
        char = yield from after_item(char, closing)
    left, right = ("{", "}") if opening == "{" else ("[", "]")
    return left + ", ".join(items) + right
