"""A grammar in Lark's notation as one regular expression, where none of its rules refers to itself.

An expression can be enforced inside a string of JSON, where the arguments of calls are; a grammar cannot.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from types import MappingProxyType

MAX_CHARS = 64 << 10
_TOKEN = re.compile(
    r"""\s+ | //[^\n]* | ->\s*\w+ | (?P<string>"(?:\\.|[^"\\\n])*"i?) | (?P<regex>/(?:\\.|[^/\\\n])+/[a-z]*)
    | (?P<times>~\s*\d+(?:\s*\.\.\s*\d+)?) | (?P<name>[?!]?\w+) | (?P<mark>\.\.|[|()\[\]?*+:])""",
    re.VERBOSE,
)
_HEAD = r"[ \t]*[?!]?\w+(?:\.\d+)?[ \t]*:(?!:)"
_RULE = re.compile(rf"^(?={_HEAD})[ \t]*[?!]?(\w+)[^:]*:(.*(?:\n(?!{_HEAD}|[ \t]*%).*)*)", re.MULTILINE)
_IMPORT = re.compile(r"^[ \t]*%import\s+common\s*(?:\.\s*(\w+)(?:\s*->\s*(\w+))?|\(([\w\s,]+)\))[ \t]*$", re.M)
_META = re.compile(r"[\\.+*?()|\[\]{}^$#&~\-/]")
# What lark calls common.
_COMMON: Mapping[str, str] = MappingProxyType(
    {
        "LF": r"\n", "CR": r"\r", "NEWLINE": r"(?:\r?\n)+", "WS": r"[ \t\f\r\n]+", "WS_INLINE": r"[ \t]+",
        "DIGIT": "[0-9]", "INT": "[0-9]+", "SIGNED_INT": "[+-]?[0-9]+", "HEXDIGIT": "[a-fA-F0-9]",
        "DECIMAL": r"(?:[0-9]+\.[0-9]*|\.[0-9]+)", "NUMBER": r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?",
        "SIGNED_NUMBER": r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?",
        "LCASE_LETTER": "[a-z]", "UCASE_LETTER": "[A-Z]", "LETTER": "[a-zA-Z]", "WORD": "[a-zA-Z]+",
        "CNAME": "[_a-zA-Z][_a-zA-Z0-9]*", "ESCAPED_STRING": r'"(?:[^"\\\n]|\\.)*"',
    }
)  # fmt: skip


class _Unable(Exception):
    """This grammar is none that an expression can stand for, or none at all."""


def lark_expression(grammar: str) -> str | None:
    """None where a rule refers to itself, or the grammar uses more than rules, terminals and `common`."""
    if len(grammar) > MAX_CHARS:
        return None
    try:
        made = _Grammar(grammar).expand("start", ())
    except (_Unable, RecursionError):
        return None
    return made if len(made) <= MAX_CHARS else None


class _Grammar:
    def __init__(self, text: str) -> None:
        self._made: dict[str, str] = {}
        for single, alias, several in _IMPORT.findall(text):
            for name in re.findall(r"\w+", several) or [single]:
                self._made[alias or name] = _common(name)
        rest = _IMPORT.sub("", text)
        self._rules = dict(_RULE.findall(rest))
        left = re.sub(r"//[^\n]*", "", _RULE.sub("", rest))
        if left.strip():  # other directives, templates, attributes of rules
            raise _Unable

    def expand(self, name: str, inside: tuple[str, ...]) -> str:
        """The expression of one rule."""
        if name in inside or (name not in self._rules and name not in self._made):
            raise _Unable
        if name not in self._made:
            self._made[name] = _Body(self, self._rules[name], (*inside, name)).whole()
        return self._made[name]


class _Body:
    """Reads what stands behind a rule's colon."""

    def __init__(self, grammar: _Grammar, text: str, inside: tuple[str, ...]) -> None:
        self._grammar, self._inside = grammar, inside
        self._tokens: list[tuple[str, str]] = []
        at = 0
        while at < len(text):
            found = _TOKEN.match(text, at)
            if found is None:
                raise _Unable
            if found.lastgroup is not None:
                self._tokens.append((found.lastgroup, found[0]))
            at = found.end()
        self._at = 0

    def whole(self) -> str:
        made = self._alternatives()
        if self._at != len(self._tokens):
            raise _Unable
        return made

    def _peek(self) -> tuple[str, str]:
        return self._tokens[self._at] if self._at < len(self._tokens) else ("", "")

    def _next(self) -> tuple[str, str]:
        token = self._peek()
        self._at += 1
        return token

    def _alternatives(self) -> str:
        options = [self._sequence()]
        size = len(options[0])
        while self._peek()[1] == "|":
            self._next()
            options.append(self._sequence())
            size += len(options[-1])
            if size > MAX_CHARS:
                raise _Unable
        return options[0] if len(options) == 1 else f"(?:{'|'.join(options)})"

    def _sequence(self) -> str:
        made = ""
        while self._peek()[1] not in ("", "|", ")", "]"):
            made += self._repeated()
            if len(made) > MAX_CHARS:
                raise _Unable
        return made

    def _repeated(self) -> str:
        item = self._item()
        kind, text = self._peek()
        if text in ("?", "*", "+"):
            self._next()
            return f"(?:{item}){text}"
        if kind == "times":
            self._next()
            low, high = (re.findall(r"\d+", text) * 2)[:2]
            return f"(?:{item}){{{low},{high}}}"
        return item

    def _item(self) -> str:
        kind, text = self._next()
        if kind == "mark" and text in ("(", "["):
            inner = self._alternatives()
            if self._next()[1] != (")" if text == "(" else "]"):
                raise _Unable
            return f"(?:{inner})" + ("?" if text == "[" else "")
        if kind == "string":
            if self._peek()[1] == "..":
                self._next()
                return f"[{_plain(text)}-{_plain(self._next()[1])}]"
            plain = _plain(text)
            return f"(?i:{plain})" if text.endswith("i") else plain
        if kind == "regex":
            pattern, _, flags = text[1:].rpartition("/")
            if set(flags) - set("imsx"):
                raise _Unable
            return f"(?{flags}:{pattern})"
        if kind == "name":
            return f"(?:{self._grammar.expand(text, self._inside)})"
        raise _Unable


def _plain(quoted: str) -> str:
    """A literal as an expression."""
    try:
        text = json.loads(quoted.removesuffix("i"))
    except ValueError:
        raise _Unable from None
    escaped = _META.sub(lambda found: "\\" + found[0], str(text))
    return escaped.replace("\n", r"\n").replace("\r", r"\r").replace("\t", r"\t")


def _common(name: str) -> str:
    if name not in _COMMON:
        raise _Unable
    return _COMMON[name]
