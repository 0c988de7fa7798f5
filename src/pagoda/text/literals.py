"""Keeps what users write from becoming control tokens: their literals travel through the template in disguise."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from pagoda.errors import BadRequest
from pagoda.text.tokenizer import Tokenizer

_PRIVATE_USE = (range(0xF0000, 0xFFFFE), range(0xE000, 0xF900))


def check_unicode(value: Any, where: str) -> None:
    """Raise BadRequest for a string, in whatever depth, that no tokenizer can read."""
    for text in strings(value):
        try:
            text.encode()
        except UnicodeEncodeError as e:
            message = f"{where} holds half of a surrogate pair at character {e.start} of a string: not valid Unicode"
            raise BadRequest(message, param=where) from None


def strings(value: Any) -> Iterator[str]:
    """All strings of a JSON value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from strings(key)
            yield from strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings(item)


def map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """The same JSON value with every string changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {map_strings(k, change): map_strings(v, change) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [map_strings(item, change) for item in value]
    return value


class Disguise:
    """One private-use character, which occurs in none of the texts, for each literal of a special token in them."""

    def __init__(self, pattern: re.Pattern[str] | None, *texts: Any) -> None:
        self._pattern = pattern
        self.by_character: dict[str, str] = {}
        self._by_literal: dict[str, str] = {}
        found = {m for value in texts for text in strings(value) for m in (pattern.findall(text) if pattern else ())}
        if found:
            free = free_characters(*texts)
            self._by_literal = {literal: next(free) for literal in sorted(found)}
            self.by_character = {character: literal for literal, character in self._by_literal.items()}

    def hide(self, value: Any) -> Any:
        if not self._by_literal or self._pattern is None:
            return value
        pattern, names = self._pattern, self._by_literal
        return map_strings(value, lambda text: pattern.sub(lambda match: names[match[0]], text))

    def reveal(self, text: str) -> str:
        return "".join(self.by_character.get(char, char) for char in text) if self.by_character else text

    def encode(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """Encode a rendered text: the template's special tokens count, what is in disguise is plain text."""
        if not self.by_character:
            return tokenizer.encode(text, add_special_tokens=False)
        encoding = tokenizer.encode_spans(text)
        ids: list[int] = encoding.ids
        out: list[int] = []
        first = start = 0
        for i, (token_id, (begin, end)) in enumerate(zip(ids, encoding.offsets, strict=True)):
            if token_id in tokenizer.special_ids and tokenizer.token_text(token_id) in text[begin:end]:
                out += [*self._between(tokenizer, text[start:begin], ids[first:i]), token_id]
                first, start = i + 1, end
        return out + self._between(tokenizer, text[start:], ids[first:])

    def _between(self, tokenizer: Tokenizer, text: str, ids: list[int]) -> list[int]:
        """The ids of a text between two special tokens; encoded anew where a literal has to come back."""
        if self.by_character.keys().isdisjoint(text):
            return ids
        return tokenizer.encode(self.reveal(text), add_special_tokens=False, parse_special=False)


def free_characters(*texts: Any) -> Iterator[str]:
    """Private-use characters that occur nowhere in the texts."""
    used = {char for value in texts for text in strings(value) for char in text if char >= "\ue000"}
    yield from (chr(code) for codes in _PRIVATE_USE for code in codes if chr(code) not in used)
    raise BadRequest("the messages use up all private-use characters of Unicode", param="messages")
