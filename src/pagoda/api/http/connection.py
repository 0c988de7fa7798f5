"""One HTTP connection: uvicorn's httptools protocol with limits on headers, JSON errors, and a way to cut it."""

from __future__ import annotations

import asyncio
import re
from typing import Any

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from pagoda.api.http.errors import error_reply, to_json
from pagoda.api.http.stream import CONNECTION
from pagoda.errors import BadRequest

HEADERS_S = 10.0
MAX_HEADER_BYTES = 32_768
MAX_HEADERS = 128
_UPGRADE = re.compile(rb"\r\nupgrade:", re.IGNORECASE)


class TooManyHeaders(BadRequest):
    status = 431
    code = "headers_too_large"


def too_many_headers() -> TooManyHeaders:
    return TooManyHeaders(f"the headers are over {MAX_HEADER_BYTES} bytes or {MAX_HEADERS} lines")


class Connection(HttpToolsProtocol):
    """Adds what uvicorn leaves open: slow or endless headers end the connection, and errors have OpenAI's shape."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._header_bytes = 0
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._deadline = self.loop.call_later(HEADERS_S, self._too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if b"pgrade" in data and (self.cycle is None or self.cycle.response_complete):
            data = _without_upgrade(data)
        super().data_received(data)
        # The parser tells of a header only when it is complete: one without an end must be noticed here.
        if self._deadline is not None:
            self._header_bytes += len(data)
            if self._header_bytes > MAX_HEADER_BYTES:
                self._refuse(too_many_headers())

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._header_bytes = 0
        if self._deadline is None:
            self._deadline = self.loop.call_later(HEADERS_S, self._too_slow)

    def on_headers_complete(self) -> None:
        self._stop_clock()
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if self.transport.is_closing():
            return
        if size > MAX_HEADER_BYTES or len(self.headers) > MAX_HEADERS:
            self._refuse(too_many_headers())
            return
        # uvicorn starts the application from here, with this scope.
        self.scope["extensions"] = {CONNECTION: {"cut": self.transport.abort}}
        super().on_headers_complete()
        if self.cycle is not None and self.cycle.scope is self.scope:
            self.scope["extensions"][CONNECTION]["outlet"] = _Outlet(self.transport, self.flow, self.cycle)

    def on_body(self, body: bytes) -> None:
        if not self.transport.is_closing():
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not self.transport.is_closing():
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(BadRequest("the request is not valid HTTP"))

    def _refuse(self, error: BadRequest) -> None:
        body = to_json(error_reply(error))
        head = (
            f"HTTP/1.1 {error.status} Bad Request\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

    def _too_slow(self) -> None:
        self._deadline = None
        self.transport.close()

    def _stop_clock(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class _Outlet:
    """See stream.Outlet. What `send` does for a part, without the four coroutines that it takes to get there."""

    __slots__ = ("_cycle", "_flow", "_write")

    def __init__(self, transport: asyncio.Transport, flow: FlowControl, cycle: RequestResponseCycle) -> None:
        self._write = transport.write
        self._flow = flow
        self._cycle = cycle

    @property
    def ready(self) -> bool:
        cycle = self._cycle
        gone = self._flow.write_paused or cycle.disconnected or cycle.response_complete
        return cycle.chunked_encoding is True and not gone

    def send(self, data: bytes) -> None:
        self._write(b"%x\r\n%b\r\n" % (len(data), data))


def _without_upgrade(data: bytes) -> bytes:
    """Ignore an offer of another protocol, as a server may: the parser would take the body for that protocol's.

    The HTTP client of Java makes this offer (h2c) in each first request to a plain address.
    """
    head, end, body = data.partition(b"\r\n\r\n")
    return _UPGRADE.sub(b"\r\nx-upgrade:", head) + end + body
