"""How the routes of one dialect write their errors and the events of their streams."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from pagoda.api.http.errors import ErrorDetail, ErrorReply

DONE = b"data: [DONE]\n\n"
# Some clients split text at these characters as if they ended a line.
_LINE_ENDS = ((b"\xc2\x85", b"\\u0085"), (b"\xe2\x80\xa8", b"\\u2028"), (b"\xe2\x80\xa9", b"\\u2029"))


PLACE = "\x00text\x00"
"""Where the text goes in the body that a `TextEvent` is made of."""


def event(body: msgspec.Struct) -> bytes:
    """One event: a line of JSON and an empty line."""
    return b"data: %b\n\n" % _line(msgspec.json.encode(body))


class TextEvent:
    """An event of which only a text changes, as most of a stream's do: all around it is encoded once."""

    def __init__(self, body: msgspec.Struct) -> None:
        self._parts = event(body).split(msgspec.json.encode(PLACE))

    def __call__(self, text: str) -> bytes:
        encoded = msgspec.json.encode(text)
        return (encoded if text.isascii() else _line(encoded)).join(self._parts)


def _line(encoded: bytes) -> bytes:
    for character, escape in _LINE_ENDS:
        if character in encoded:
            encoded = encoded.replace(character, escape)
    return encoded


def named(body: msgspec.Struct) -> bytes:
    """One event under the name that is its type."""
    return b"event: %b\n%b" % (str(body.__struct_config__.tag).encode(), event(body))


@dataclass(frozen=True, slots=True)
class Dialect:
    """`error` renders an error, `line` one event of a stream. An empty `heartbeat`: silence is all there is."""

    error_kind: type[msgspec.Struct]
    error: Callable[[ErrorDetail], msgspec.Struct]
    line: Callable[[msgspec.Struct], bytes]
    media_type: str = "text/event-stream; charset=utf-8"
    heartbeat: bytes = b": keep-alive\n\n"


OPENAI = Dialect(ErrorReply, lambda detail: ErrorReply(error=detail), event)
