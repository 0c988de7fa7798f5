"""How the routes of one dialect write their errors and the events of their streams."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from pagoda.api.http.errors import ErrorDetail, ErrorReply

DONE = b"data: [DONE]\n\n"
# Some clients split text at these characters as if they ended a line.
_LINE_ENDS = ((b"\xc2\x85", b"\\u0085"), (b"\xe2\x80\xa8", b"\\u2028"), (b"\xe2\x80\xa9", b"\\u2029"))


def event(body: msgspec.Struct) -> bytes:
    """One event: a line of JSON and an empty line."""
    line = msgspec.json.encode(body)
    for character, escape in _LINE_ENDS:
        if character in line:
            line = line.replace(character, escape)
    return b"data: %b\n\n" % line


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
