"""Tool calls whose arguments are JSON: objects with a name in them, lists of those, and names before an object."""

from __future__ import annotations

import msgspec

from pagoda.text.tool_parsers.reading import (
    MAX_NAME_CHARS,
    Calls,
    Chars,
    Malformed,
    expect,
    json_nested,
    json_string,
    next_visible,
    one,
    until,
)

_ARGUMENTS = ("arguments", "parameters")
_HARMLESS = ("name", "id", "type", "index", *_ARGUMENTS)
_SEPARATOR = "<｜tool▁sep｜>"
_DEEPSEEK_END = "<｜tool▁call▁end｜>"
_MAX_BETWEEN_CHARS = 16


def call_object(calls: Calls, first: str = "", *, known_only: bool = False) -> Chars[None]:
    """`{"name": ..., "arguments": {...}}`; the call is written as soon as its arguments begin.

    `known_only`: nothing marks it as a call, so it is one only if a function has that name.
    """
    if (first or (yield from next_visible())) != "{":
        raise Malformed
    name: str | None = None
    early: list[str] = []  # arguments that came before the name
    written = strange = False
    char = yield from next_visible()
    while char != "}":
        key, char = yield from _key(char)
        if key == "name" and char == '"' and name is None:
            name = _text((yield from json_string()))
            if known_only and name not in calls.names:
                raise Malformed
            char = yield from next_visible()
        elif key in _ARGUMENTS and not written and not early:
            char = yield from (_arguments(char, early) if name is None else _write(calls, name, char))
            written = name is not None
        else:
            strange = strange or key not in _HARMLESS
            char = yield from _skip(char)
        char = yield from _next_item(char)
    if name is None or (strange and not written and not early):
        raise Malformed
    if not written:
        calls.begin(name)
        calls.arguments("".join(early or ["{}"]))
    calls.settle()


def _key(first: str) -> Chars[tuple[str, str]]:
    """The key that begins here, and the first character of its value."""
    if first != '"':
        raise Malformed
    key = yield from json_string()
    yield from expect(":", (yield from next_visible()))
    return key, (yield from next_visible())


def _next_item(char: str) -> Chars[str]:
    """What follows a value: the beginning of the next key, or the closing bracket."""
    if char == ",":
        return (yield from next_visible())
    if char != "}":
        raise Malformed
    return char


def _write(calls: Calls, name: str, first: str) -> Chars[str]:
    """Write a call with the arguments that begin here; gives the next visible character."""
    if first == "{":
        calls.begin(name)
        yield from json_nested(first, calls.arguments)
        return (yield from next_visible())
    held: list[str] = []
    char = yield from _arguments(first, held)
    calls.begin(name)
    calls.arguments("".join(held))
    return char


def _arguments(first: str, held: list[str]) -> Chars[str]:
    """Arguments as an object, as text that holds one, or as null; gives the next visible character."""
    if first == "{":
        yield from json_nested(first, held.append)
    elif first == '"':
        text = _text((yield from json_string()))
        if not text.lstrip().startswith("{"):
            raise Malformed
        held.append(text)
    elif first == "n":
        yield from expect("null", first)
        held.append("{}")
    else:
        raise Malformed
    return (yield from next_visible())


def _skip(first: str) -> Chars[str]:
    """Any value; gives the next visible character."""
    if first in "{[":
        yield from json_nested(first, lambda _: None)
    elif first == '"':
        yield from json_string()
    else:
        for _ in range(MAX_NAME_CHARS):
            char = yield from one()
            if char in ",}":
                return char
        raise Malformed
    return (yield from next_visible())


def _text(quoted: str) -> str:
    try:
        return msgspec.json.decode(f'"{quoted}"'.encode(), type=str)
    except (msgspec.MsgspecError, UnicodeError):
        raise Malformed from None


def listed_calls(calls: Calls) -> Chars[None]:
    """A list of call objects, or a single one."""
    char = yield from next_visible()
    yield from _list_or_object(calls, char)


def _list_or_object(calls: Calls, first: str) -> Chars[None]:
    if first != "[":
        yield from call_object(calls, first)
        return
    char = yield from next_visible()
    while char != "]":
        yield from call_object(calls, char)
        char = yield from next_visible()
        if char == ",":
            char = yield from next_visible()
        elif char != "]":
            raise Malformed


def bare_objects(calls: Calls) -> Chars[None]:
    """Llama 3: the whole answer is a call object, or several with `;` or `,` between them."""
    char = yield from next_visible()
    while True:
        yield from call_object(calls, char, known_only=True)
        char = yield from next_visible()
        if char in ";,":
            char = yield from next_visible()


def mistral_calls(calls: Calls) -> Chars[None]:
    """A list of call objects, or newer: NAME[ARGS]{...} and NAME{...}."""
    char = yield from next_visible()
    if char in "[{":
        yield from _list_or_object(calls, char)
        return
    name: list[str] = []
    while char not in "[{":
        name.append(char)
        char = yield from one()
        if len(name) > MAX_NAME_CHARS:
            raise Malformed
    if char == "[":
        if (yield from until("]")) == "CALL_ID":
            yield from until("[ARGS]")
        char = yield from next_visible()
    yield from _object_of("".join(name), calls, char)


def deepseek_call(calls: Calls) -> Chars[None]:
    """NAME<sep>{...} (V3.1), or function<sep>NAME and the object in a block of code (V3)."""
    name = yield from until(_SEPARATOR)
    char = yield from next_visible()
    if char == "{":
        yield from _object_of(name, calls, char)
        return
    name = char + (yield from until("\n"))
    char = yield from next_visible()
    if char == "`":
        yield from expect("```json", char)
        char = yield from next_visible()
    yield from _object_of(name, calls, char)
    if (yield from until(_DEEPSEEK_END, limit=_MAX_BETWEEN_CHARS)).strip() not in ("", "```"):
        raise Malformed


def kimi_call(calls: Calls) -> Chars[None]:
    """functions.NAME:INDEX, a mark, an object."""
    call_id = yield from until("<|tool_call_argument_begin|>")
    name = call_id.strip().removeprefix("functions.").partition(":")[0]
    yield from _object_of(name, calls, (yield from next_visible()))


def _object_of(name: str, calls: Calls, first: str) -> Chars[None]:
    if first != "{":
        raise Malformed
    calls.begin(name.strip())
    yield from json_nested(first, calls.arguments)
