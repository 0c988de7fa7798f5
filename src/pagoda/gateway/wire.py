"""HTTP/1.1 as a client: one request on one connection, its answer in the parts in which it arrives."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncGenerator, Iterable, Mapping
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

import httptools
import msgspec

from pagoda.errors import ConfigError

CONNECT_S = 10.0
MAX_HEADER_BYTES = 1 << 16
MAX_WHOLE_BYTES = 1 << 28
_PIECE_BYTES = 1 << 16
_NOT_PASSED_ON = frozenset(
    ("connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade", "content-length")
)


class Unreachable(Exception):
    """Nobody answered, or the connection ended in the middle: `started` says that an answer had begun."""

    def __init__(self, why: str, *, started: bool) -> None:
        super().__init__(why)
        self.started = started


@dataclass(frozen=True, slots=True)
class Place:
    """Where a server listens: a Unix socket, or a host and port; `prefix` is put in front of each path."""

    uds: str | None = None
    host: str = ""
    port: int = 0
    tls: bool = False
    prefix: str = ""

    def __str__(self) -> str:
        if self.uds is not None:
            return f"unix:{self.uds}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}{self.prefix}"


def place_of(url: str, flag: str) -> Place:
    """http://host:port, with or without /v1 behind it."""
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username:
        raise ConfigError(f"{flag} {url} is no address of a server", remedy=f"Write {flag} http://host:11434")
    tls = parts.scheme == "https"
    prefix = parts.path.rstrip("/").removesuffix("/v1")
    return Place(None, parts.hostname, port or (443 if tls else 80), tls, prefix)


class Answer:
    """An answer whose head has arrived; `parts` gives the body, once. `close` ends the connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, head_only: bool) -> None:
        self._head_only = head_only
        self._reader = reader
        self._writer = writer
        self._parser = httptools.HttpResponseParser(self)
        self._body: list[bytes] = []
        self._head_bytes = 0
        self._complete = False
        self.headers: dict[str, str] = {}
        self.status = 0

    # What the parser calls.
    def on_header(self, name: bytes, value: bytes) -> None:
        key, text = name.decode("latin-1").lower(), value.decode("latin-1")
        self.headers[key] = f"{self.headers[key]}, {text}" if key in self.headers else text

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        self._complete = self.status >= 200

    @property
    def is_stream(self) -> bool:
        return self.headers.get("content-type", "").startswith(("text/event-stream", "application/x-ndjson"))

    def kept_headers(self) -> dict[str, str]:
        """Those that are for whoever asked."""
        dropped = {*_NOT_PASSED_ON, "content-type", "server", "date"}
        return {name: value for name, value in self.headers.items() if name not in dropped}

    async def read_head(self) -> None:
        while self.status < 200:
            data = await self._read()
            self._head_bytes += len(data)
            if not data or self._head_bytes > MAX_HEADER_BYTES + _PIECE_BYTES:
                raise Unreachable("it closed the connection without an answer", started=False)
            self._feed(data)

    async def parts(self) -> AsyncGenerator[bytes, None]:
        """The body as it comes. Raises Unreachable where it is cut off."""
        try:
            while True:
                body, self._body = self._body, []
                for part in body:
                    yield part
                if self._complete or self._head_only:
                    return
                data = await self._read()
                if data:
                    self._feed(data)
                elif "content-length" in self.headers or "transfer-encoding" in self.headers:
                    raise Unreachable("the connection ended in the middle of the answer", started=True)
                else:
                    return
        finally:
            self.close()

    async def whole(self) -> bytes:
        out = bytearray()
        async with contextlib.aclosing(self.parts()) as parts:
            async for part in parts:
                out += part
                if len(out) > MAX_WHOLE_BYTES:
                    raise Unreachable(f"its answer is over {MAX_WHOLE_BYTES >> 20} MiB", started=True)
        return bytes(out)

    def close(self) -> None:
        self._writer.close()

    async def _read(self) -> bytes:
        try:
            return await self._reader.read(_PIECE_BYTES)
        except OSError as error:
            raise Unreachable(error.strerror or str(error), started=self.status > 0) from None

    def _feed(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            raise Unreachable("what it sent is no HTTP", started=self.status > 0) from None


async def call(
    place: Place, method: str, path: str, headers: Mapping[str, str] | Iterable[tuple[str, str]] = (), body: bytes = b""
) -> Answer:
    """Send one request and wait for the head of its answer. Raises Unreachable."""
    try:
        async with asyncio.timeout(CONNECT_S):
            reader, writer = await _connect(place)
    except (OSError, TimeoutError) as error:
        why = getattr(error, "strerror", None) or str(error) or f"no connection within {CONNECT_S:g} s"
        raise Unreachable(str(why), started=False) from None
    answer = Answer(reader, writer, head_only=method == "HEAD")
    try:
        writer.write(_head(place, method, path, dict(headers), len(body)) + body)
        await writer.drain()
        await answer.read_head()
    except OSError as error:
        writer.close()
        raise Unreachable(error.strerror or str(error), started=False) from None
    except BaseException:
        writer.close()
        raise
    return answer


async def _connect(place: Place) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if place.uds is not None:
        return await asyncio.open_unix_connection(place.uds)
    context = ssl.create_default_context() if place.tls else None
    return await asyncio.open_connection(place.host, place.port, ssl=context)


def _head(place: Place, method: str, path: str, headers: Mapping[str, str], size: int) -> bytes:
    host = "localhost" if place.uds is not None else str(place).partition("://")[2].partition("/")[0]
    kept = {name: value for name, value in headers.items() if name.lower() not in (*_NOT_PASSED_ON, "host", "expect")}
    lines = [f"{method} {place.prefix}{path} HTTP/1.1", f"host: {host}", "connection: close"]
    lines += [f"{name}: {value}" for name, value in kept.items()]
    if size or method not in ("GET", "HEAD"):
        lines.append(f"content-length: {size}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def as_json(body: bytes) -> object:
    """For what other servers say: anything may come."""
    try:
        return cast(object, msgspec.json.decode(body))
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
