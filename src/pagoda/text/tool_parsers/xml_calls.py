"""Tool calls written as tags: Qwen3-Coder, GLM and MiniMax; values are text, typed by the function's schema."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from pagoda.text.tool_parsers.json_calls import call_object
from pagoda.text.tool_parsers.reading import MAX_NAME_CHARS, Calls, Chars, Malformed, expect, next_visible, one, until


class _Writer:
    """One call, whose arguments are written one by one."""

    def __init__(self, calls: Calls, name: str) -> None:
        calls.begin(name)
        self._calls = calls
        self._schema = calls.schemas.get(name, {})
        self._between = "{"

    def argument(self, key: str, value: str) -> None:
        text = msgspec.json.encode(key).decode()
        self._calls.arguments(f"{self._between}{text}: {_as_json(value, self._schema, key)}")
        self._between = ", "

    def end(self) -> None:
        self._calls.arguments("{}" if self._between == "{" else "}")


def _as_json(value: str, schema: Mapping[str, Any], key: str) -> str:
    """The value as the schema wants it; without one, whatever JSON it is, or else text."""
    properties = schema.get("properties")
    wanted = properties.get(key) if isinstance(properties, Mapping) else None
    kind = wanted.get("type") if isinstance(wanted, Mapping) else None
    text = value.strip()
    if kind == "boolean" or text in ("True", "False", "None"):
        text = {"None": "null"}.get(text, text.lower())
    if kind != "string":
        try:
            msgspec.json.decode(text)
            return text
        except (msgspec.DecodeError, UnicodeError, RecursionError):
            pass
    return msgspec.json.encode(value).decode()


def tagged_call(calls: Calls) -> Chars[None]:
    """Behind <tool_call>, which several families write: what comes first tells them apart."""
    first = yield from next_visible()
    if first == "{":
        yield from call_object(calls, first)
    elif first == "<":
        yield from _coder_call(calls, first)
    else:
        yield from _glm_call(calls, first)


def _coder_call(calls: Calls, first: str) -> Chars[None]:
    """<function=NAME> <parameter=KEY> VALUE </parameter> </function>"""
    yield from expect("<function=", first)
    yield from _function(calls, (yield from until(">")), "parameter=", "function")


def minimax_calls(calls: Calls) -> Chars[None]:
    """<invoke name="NAME"> <parameter name="KEY">VALUE</parameter> </invoke>, any number of them"""
    yield from expect("<", (yield from next_visible()))
    while (char := (yield from one())) == "i":
        yield from expect('invoke name="', char)
        yield from _function(calls, (yield from until('">')), 'parameter name="', "invoke")
        yield from expect("<", (yield from next_visible()))
    yield from expect("/minimax:tool_call>", char)


def _function(calls: Calls, name: str, parameter: str, closing: str) -> Chars[None]:
    writer = _Writer(calls, name.strip())
    try:
        while True:
            yield from expect("<", (yield from next_visible()))
            char = yield from one()
            if char == "/":
                yield from expect(f"{closing}>")
                return
            yield from expect(parameter, char)
            key = (yield from until(">")).strip().removesuffix('"')
            value = yield from until("</parameter>", limit=None)
            writer.argument(key, value.removeprefix("\n").removesuffix("\n"))
    finally:
        writer.end()


def _glm_call(calls: Calls, first: str) -> Chars[None]:
    """NAME <arg_key>KEY</arg_key> <arg_value>VALUE</arg_value>, any number of arguments, </tool_call>"""
    read = [first]
    while (char := (yield from one())) not in "\n<":
        read.append(char)
        if len(read) > MAX_NAME_CHARS:
            raise Malformed
    name = "".join(read).strip()
    if name not in calls.names:
        raise Malformed
    yield from expect("<", char if char == "<" else (yield from next_visible()))
    writer = _Writer(calls, name)
    try:
        while (char := (yield from one())) == "a":
            yield from expect("arg_key>", char)
            key = yield from until("</arg_key>")
            yield from expect("<arg_value>", (yield from next_visible()))
            writer.argument(key.strip(), (yield from until("</arg_value>", limit=None)))
            yield from expect("<", (yield from next_visible()))
        yield from expect("/tool_call>", char)
    finally:
        writer.end()
