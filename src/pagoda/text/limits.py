"""How large the values of a chat template may grow, one by one and all together."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

_ELEMENT_SIZE = 8
_MAX_DEPTH = 64
_BASE_SIZE = 1 << 20
_TOTAL_FACTOR = 64
_MAX_INTEGER_BITS = 4096


class TemplateLimit(RuntimeError):
    """The template wants more memory than its task can need."""


class Budget:
    """Limits of one rendering: a megabyte per value, and more where the messages themselves are larger.

    The size of a container counts its parts as often as they occur in it, as writing it out would.
    """

    def __init__(self, *inputs: Any) -> None:
        self._known: dict[int, int] = {}
        self.max_size = _BASE_SIZE + 4 * sum(map(self._learn, inputs))
        self._left = _TOTAL_FACTOR * self.max_size

    def _learn(self, value: Any, depth: int = 0) -> int:
        """Remember the sizes of the inputs, which live as long as this and don't change."""
        if depth > _MAX_DEPTH:
            raise TemplateLimit("the input is nested too deeply")
        if isinstance(value, str):
            return len(value)
        size = _ELEMENT_SIZE
        if isinstance(value, dict):
            size += sum(self._learn(k, depth + 1) + self._learn(v, depth + 1) for k, v in value.items())
        elif isinstance(value, list | tuple):
            size += sum(self._learn(item, depth + 1) for item in value)
        else:
            return size
        self._known[id(value)] = size
        return size

    def size(self, value: Any) -> int:
        """The size of a value; raises as soon as it is past the limit."""
        total = 0
        stack = [(value, 0)]
        while stack:
            item, depth = stack.pop()
            if isinstance(item, str):
                total += len(item)
            elif isinstance(item, int):
                total += _ELEMENT_SIZE + item.bit_length() // 3
            elif (known := self._known.get(id(item))) is not None:
                total += known
            elif isinstance(item, dict | list | tuple | set | frozenset):
                total += _ELEMENT_SIZE * (1 + len(item))
                if total > self.max_size or depth > _MAX_DEPTH:
                    raise TemplateLimit("a value is too large")
                children = [*item.keys(), *item.values()] if isinstance(item, dict) else item
                stack += [(child, depth + 1) for child in children]
            else:
                total += _ELEMENT_SIZE
            if total > self.max_size:
                raise TemplateLimit("a value is too large")
        return total

    def check_size(self, size: int) -> None:
        if size > self.max_size:
            raise TemplateLimit("a value is too large")

    def admit(self, value: Any) -> Any:
        """Let a new value in: not too large, and paid for from the memory of the whole rendering."""
        self.size(value)
        return self.pay(value)

    def pay(self, value: Any) -> Any:
        if isinstance(value, str):
            self._left -= len(value)
        elif isinstance(value, Sized):
            self._left -= _ELEMENT_SIZE * len(value)
        if self._left < 0:
            raise TemplateLimit("all values together are too large")
        return value

    def check_repeat(self, left: Any, right: Any) -> None:
        """Before `left * right`."""
        if isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() + right.bit_length())
        for value, count in ((left, right), (right, left)):
            if isinstance(value, Sized) and isinstance(count, int):
                self.check_size(self.size(value) * max(count, 0))

    def check_power(self, base: Any, exponent: Any) -> None:
        """Before `base ** exponent`."""
        if isinstance(base, int) and isinstance(exponent, int):
            _check_bits(base.bit_length() * abs(exponent))

    def check_format(self, pattern: str, sign: str, values: Any) -> None:
        """Before a string with fields is filled: every field could show all values, as wide as three digits say."""
        self.check_size(len(pattern) + pattern.count(sign) * (self.size(values) + 1000))

    def check_replace(self, text: str, old: str, new: str) -> None:
        self.check_size(len(text) + text.count(old) * max(len(new) - len(old), 0))

    def check_join(self, separator: str, items: list[Any]) -> None:
        self.check_size(self.size(items) + len(separator) * len(items))


def _check_bits(bits: int) -> None:
    if bits > _MAX_INTEGER_BITS:
        raise TemplateLimit("a number is too large")
