"""One HTTP connection: uvicorn's httptools protocol with limits on headers, JSON errors, and a way to cut it."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from pagoda.api.replies import to_json
from pagoda.api.shape import error_reply
from pagoda.api.stream import ABORT_EXTENSION
from pagoda.errors import BadRequest

HEADERS_S = 10.0
MAX_HEADER_BYTES = 32_768
MAX_HEADERS = 128


class TooManyHeaders(BadRequest):
    status = 431
    code = "headers_too_large"


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

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._header_bytes = 0
        if self._deadline is None:
            self._deadline = self.loop.call_later(HEADERS_S, self._too_slow)

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._count(len(name) + len(value))

    def on_headers_complete(self) -> None:
        self._stop_clock()
        # uvicorn starts the application from here, with this scope.
        self.scope["extensions"] = {ABORT_EXTENSION: {"cut": self.transport.abort}}
        if not self.transport.is_closing():
            super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(BadRequest("the request is not valid HTTP"))

    def _count(self, size: int) -> None:
        self._header_bytes += size
        if (self._header_bytes > MAX_HEADER_BYTES or len(self.headers) > MAX_HEADERS) and not self._closing:
            self._refuse(TooManyHeaders(f"the headers are over {MAX_HEADER_BYTES} bytes or {MAX_HEADERS} lines"))

    @property
    def _closing(self) -> bool:
        return self.transport.is_closing()

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
