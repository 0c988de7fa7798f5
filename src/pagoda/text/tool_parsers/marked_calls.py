"""Tool calls of FunctionGemma and Gemma 4: `call:f{a:<escape>text<escape>,b:[1,2]}`; strings between marks."""

from __future__ import annotations

import msgspec

from pagoda.text.tool_parsers.pythonic import MAX_DEPTH, WORDS, after_item, identifier, number
from pagoda.text.tool_parsers.reading import Calls, Chars, Malformed, expect, next_visible, until

STRING, GEMMA4_STRING = "<escape>", '<|"|>'
"""The marks around a string."""


def marked_call(calls: Calls, mark: str = STRING) -> Chars[None]:
    """It is written when it is complete; only known functions are calls."""
    yield from expect("call:", (yield from next_visible()))
    name = (yield from until("{")).strip()
    if name not in calls.names:
        raise Malformed
    arguments = yield from _nested("{", 0, mark)
    calls.begin(name)
    calls.arguments(arguments)


def _nested(opening: str, depth: int, mark: str) -> Chars[str]:
    """The rest of an object or a list, as JSON."""
    if depth > MAX_DEPTH:
        raise Malformed
    closing = "}" if opening == "{" else "]"
    items: list[str] = []
    char = yield from next_visible()
    while char != closing:
        key = ""
        if opening == "{":
            name = (char + (yield from until(":"))).strip()
            key = f"{_json(name.removeprefix(mark).removesuffix(mark))}: "
            char = yield from next_visible()
        value, char = yield from _value(char, depth, mark)
        items.append(key + value)
        char = yield from after_item(char, closing)
    return opening + ", ".join(items) + closing


def _value(first: str, depth: int, mark: str) -> Chars[tuple[str, str]]:
    """A value as JSON, and the visible character behind it."""
    if first == mark[0]:
        yield from expect(mark, first)
        text = _json((yield from until(mark, limit=None)))
        return text, (yield from next_visible())
    if first in "[{":
        text = yield from _nested(first, depth + 1, mark)
        return text, (yield from next_visible())
    word, char = yield from identifier(first, also="+-.")
    return WORDS.get(word) or number(word), char


def _json(text: str) -> str:
    try:
        return msgspec.json.encode(text).decode()
    except UnicodeError:
        raise Malformed from None
