"""A small HTTP/1.1 client for load: keeps its connections, notes when bytes arrive, and parses nothing meanwhile."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import SplitResult, urlsplit

import httptools

from pagoda.errors import ConfigError


@dataclass(slots=True)
class Exchange:
    """One request and what came back: pieces of the body with the time of their arrival. `error`: no whole answer."""

    start_s: float = 0.0
    end_s: float = 0.0
    status: int = 0
    arrived: list[tuple[float, bytes]] = field(default_factory=list)
    error: str = ""

    @property
    def body(self) -> bytes:
        return b"".join(piece for _, piece in self.arrived)


class _Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._exchange: Exchange | None = None
        self._done: asyncio.Future[None] | None = None
        self._now_s = 0.0
        self.reusable = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    async def send(self, request: bytes, exchange: Exchange) -> None:
        if self._transport is None:
            raise OSError("the connection is not open")
        self._parser = httptools.HttpResponseParser(self)
        self._exchange, self.reusable = exchange, False
        self._done = asyncio.get_running_loop().create_future()
        exchange.start_s = time.perf_counter()
        self._transport.write(request)
        await self._done

    def data_received(self, data: bytes) -> None:
        if self._exchange is None:
            self.close()
            return
        self._now_s = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(f"this is not HTTP: {error}")
            self.close()

    def on_headers_complete(self) -> None:
        if self._exchange is not None:
            self._exchange.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if self._exchange is not None:
            self._exchange.arrived.append((self._now_s, body))

    def on_message_complete(self) -> None:
        self.reusable = self._parser.should_keep_alive()
        self._end("")

    def connection_lost(self, error: Exception | None) -> None:
        self.reusable = False
        # A body without a length ends with its connection; whether it is whole, the reader of the body sees.
        seen = self._exchange is not None and self._exchange.status
        self._end("" if seen and error is None else f"the connection broke: {error or 'closed before an answer'}")

    def _end(self, error: str) -> None:
        if self._exchange is not None:
            self._exchange.end_s, self._exchange.error = time.perf_counter(), error
            self._exchange = None
        if self._done is not None and not self._done.done():
            self._done.set_result(None)

    def close(self) -> None:
        self.reusable = False
        if self._transport is not None:
            self._transport.abort()


class Client:
    """Sends requests to one server; as many connections as requests are under way."""

    def __init__(self, url: str, headers: Mapping[str, str], timeout_s: float) -> None:
        self._parts, self._timeout_s = address(url), timeout_s
        self._idle: list[_Connection] = []
        host = self._parts.netloc.rpartition("@")[2]
        self._head = "".join(f"{k}: {v}\r\n" for k, v in {"Host": host, **headers}.items())
        self._ssl = ssl.create_default_context() if self._parts.scheme == "https" else None

    def request(self, method: str, path: str, body: bytes = b"") -> bytes:
        """The bytes of a request, made before the clock runs."""
        head = f"{method} {self._parts.path.rstrip('/')}{path} HTTP/1.1\r\n{self._head}"
        return f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body

    async def send(self, request: bytes) -> Exchange:
        exchange = Exchange(start_s=time.perf_counter())
        connection: _Connection | None = None
        try:
            async with asyncio.timeout(self._timeout_s):
                connection = await self._take()
                await connection.send(request, exchange)
        except TimeoutError:
            exchange.error = f"no answer within {self._timeout_s:g} s"
        except OSError as error:
            exchange.error = f"cannot connect: {error.strerror or error}"
        exchange.end_s = exchange.end_s or time.perf_counter()
        if connection is not None:
            if connection.reusable:
                self._idle.append(connection)
            else:
                connection.close()
        return exchange

    async def _take(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable:
                return connection
        port = self._parts.port or (443 if self._ssl else 80)
        loop = asyncio.get_running_loop()
        host = self._parts.hostname or ""
        return (await loop.create_connection(_Connection, host, port, ssl=self._ssl))[1]

    def close(self) -> None:
        for connection in self._idle:
            connection.close()


def address(url: str) -> SplitResult:
    """The parts of a base URL; /v1 at its end is taken away, since paths are given whole."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise ConfigError(f"{url} is not the address of a server", remedy="Write it as http://localhost:8000")
    path = parts.path.rstrip("/")
    return parts._replace(path=path.removesuffix("/v1"))
