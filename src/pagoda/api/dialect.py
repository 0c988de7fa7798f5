"""How the routes of one dialect write their errors and the events of their streams."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.types import Message, Receive, Scope, Send

from pagoda.api.generation import Generation
from pagoda.api.replies import ErrorDetail, ErrorReply
from pagoda.api.stream import EventStream, event


@dataclass(frozen=True, slots=True)
class Dialect:
    """`error` renders an error, `line` one event of a stream. An empty `heartbeat`: silence is all there is."""

    error_kind: type[msgspec.Struct]
    error: Callable[[ErrorDetail], msgspec.Struct]
    line: Callable[[msgspec.Struct], bytes]
    media_type: str = "text/event-stream; charset=utf-8"
    heartbeat: bytes = b": keep-alive\n\n"


OPENAI = Dialect(ErrorReply, lambda detail: ErrorReply(error=detail), event)


def arguments_object(text: str) -> dict[str, Any]:
    """A call's arguments. What is no object is wrapped as Anthropic says how: the tool's own check then shows it."""
    try:
        parsed = json.loads(text or "{}")
    except (ValueError, RecursionError):
        parsed = None
    return parsed if isinstance(parsed, dict) else {"INVALID_JSON": text}


class DialectStream(EventStream):
    """An EventStream whose own words, heartbeats and errors, are put into another dialect.

    The events it is given must be in that dialect already, and none of them may begin with `:` or `data:`.
    """

    def __init__(
        self, dialect: Dialect, generation: Generation, events: AsyncGenerator[bytes, None], aborted: asyncio.Event
    ) -> None:
        super().__init__(generation, events, aborted)
        self._dialect = dialect

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def translated(message: Message) -> None:
            if message["type"] == "http.response.start":
                kind = (b"content-type", self._dialect.media_type.encode())
                message["headers"] = [kind, *(each for each in message["headers"] if each[0] != b"content-type")]
            elif given := message["body"]:
                message["body"] = self._translate(given)
                if not message["body"]:
                    return
            await send(message)

        await super().__call__(scope, receive, translated)

    def _translate(self, data: bytes) -> bytes:
        if data.startswith(b":"):
            return self._dialect.heartbeat
        if data.startswith(b"data: "):
            detail = msgspec.json.decode(data.removeprefix(b"data: "), type=ErrorReply).error
            return self._dialect.line(self._dialect.error(detail))
        return data
