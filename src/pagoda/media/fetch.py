"""Gets a picture from where a request says: from the web without reaching what only this machine can, or from a folder.

A URL is taken apart once, and what was taken apart is what is fetched: its host is looked up here, each address it has
must be a public one, and the connection goes to the address that was checked. A redirect is a new URL.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import re
import socket
import ssl
import stat
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.parse import quote, unquote, urljoin

import httptools

from pagoda.errors import BadRequest

NOWHERE = "none"
MAX_BYTES = 32 << 20
FETCH_S = 15.0
MAX_REDIRECTS = 3
MAX_HEADER_BYTES = 32 << 10
_READ_BYTES = 1 << 16
_URL = re.compile(r"(https?)://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::([0-9]{1,5}))?((?:[/?][!-~]*)?)", re.IGNORECASE)
_PRINTABLE = "".join(map(chr, range(33, 127)))
_PORTS = {"http": 80, "https": 443}
_REDIRECTS = (301, 302, 303, 307, 308)
_TRANSLATED = ipaddress.ip_network("64:ff9b::/96")
_UNICAST = ipaddress.ip_network("2000::/3")
# What older versions of Python take for public.
_SPECIAL = [
    ipaddress.ip_network(text)
    for text in ("100.64.0.0/10", "192.0.0.0/24", "192.88.99.0/24", "2001::/23", "3fff::/20", "5f00::/16")
]

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Lookup = Callable[[str, int], Awaitable[Sequence[str]]]


@dataclass(frozen=True, slots=True)
class Permission:
    """What may be fetched. `domains`: only these, which may then be in a private network too; "none" is none at all.

    `folder`: the one below which files may be named.
    """

    domains: tuple[str, ...] = ()
    folder: str | None = None


@dataclass(frozen=True, slots=True)
class Url:
    scheme: str
    host: str
    port: int
    target: str

    @property
    def name(self) -> str:
        """As it goes into the Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"


async def fetch(where: str, url: str, permission: Permission, lookup: Lookup | None = None) -> bytes:
    """The bytes behind a URL. Raises BadRequest, without telling what an address that is not for clients answered."""
    if url[:5].lower() == "file:":
        return await asyncio.to_thread(read_file, where, url, permission.folder)
    parsed = parse_url(where, url)
    try:
        async with asyncio.timeout(FETCH_S):
            for _ in range(MAX_REDIRECTS + 1):
                address = await _checked_address(where, parsed, permission, lookup or _look_up)
                reply = await _get(where, parsed, address)
                if reply.status not in _REDIRECTS:
                    return _body(where, reply)
                location = reply.headers.get("location", "")
                origin = f"{parsed.scheme}://{parsed.name}{parsed.target}"
                parsed = parse_url(where, urljoin(origin, location) if location else "")
    except TimeoutError:
        raise _failed(where, f"it did not come within {FETCH_S:g} s") from None
    except (OSError, ValueError, asyncio.IncompleteReadError, httptools.HttpParserError, httptools.HttpParserUpgrade):
        raise _failed(where, "its server cannot be reached, or does not answer as it should") from None
    raise _failed(where, f"it is redirected more than {MAX_REDIRECTS} times")


def _failed(where: str, why: str) -> BadRequest:
    return BadRequest(
        f"{where}: the URL cannot be fetched: {why}", remedy="Send the picture itself, as a data: URI", param="messages"
    )


def parse_url(where: str, url: str) -> Url:
    """Only what cannot be read in two ways: no user, no backslash, no blank, no fragment."""
    found = _URL.fullmatch(quote(url.partition("#")[0], safe=_PRINTABLE))
    if found is None or int(found[3] or 1) not in range(1, 65536):
        raise BadRequest(
            f"{where} must hold a data: URI with base64, or a plain http(s) URL: https://host/path", param="messages"
        )
    scheme = found[1].lower()
    target = found[4] if found[4].startswith("/") else "/" + found[4]
    return Url(scheme, found[2].strip("[]").rstrip(".").lower(), int(found[3] or _PORTS[scheme]), target)


async def _look_up(host: str, port: int) -> list[str]:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


async def _checked_address(where: str, url: Url, permission: Permission, lookup: Lookup) -> str:
    """The address to connect to. All that the name has must be allowed, so that it does not matter which one it is."""
    named = _is_named(url.host, permission.domains)
    if permission.domains and not named:
        allowed = "it fetches none" if permission.domains == (NOWHERE,) else "it is not among --allowed-media-domains"
        raise BadRequest(
            f"{where}: this server does not fetch from {url.host[:100]}: {allowed}",
            remedy="Send the picture itself, as a data: URI",
            param="messages",
        )
    try:
        addresses = list(dict.fromkeys(await lookup(url.host, url.port)))
    except UnicodeError:
        addresses = []
    if not addresses:
        raise _failed(where, "its host has no address")
    if not all(_may_reach(ipaddress.ip_address(each.partition("%")[0]), named) for each in addresses):
        raise BadRequest(
            f"{where}: this server does not fetch from {url.host[:100]}: its address is not a public one",
            remedy="Send the picture itself, as a data: URI, or start the server with --allowed-media-domains HOST",
            param="messages",
        )
    return addresses[0]


def _is_named(host: str, domains: Sequence[str]) -> bool:
    return any(host == domain.lower().rstrip(".") for domain in domains)


def _may_reach(address: Address, named: bool) -> bool:
    """Public ones; those of private networks too where the operator named the host. Link-local ones never: there
    clouds keep their keys."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if address in _TRANSLATED:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return _may_reach(inner, named)
        if address.teredo is not None or address.is_site_local:
            return False
    if address.is_link_local or address.is_multicast or address.is_unspecified:
        return False
    if named:
        return True
    if isinstance(address, ipaddress.IPv6Address) and address not in _UNICAST:
        return False
    special = any(address in network for network in _SPECIAL)
    return address.is_global and not (address.is_private or address.is_reserved or address.is_loopback or special)


class _Reply:
    """What httptools tells of a response."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.parts: list[bytes] = []
        self.size_bytes = 0
        self.complete = False
        self._header_bytes = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        self._header_bytes += len(name) + len(value)
        if self._header_bytes > MAX_HEADER_BYTES:
            raise ValueError("headers")
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        self.size_bytes += len(body)
        self.parts.append(body)

    def on_message_complete(self) -> None:
        self.complete = True


async def _get(where: str, url: Url, address: str) -> _Reply:
    """One request over a connection of its own, to this address only."""
    secure = _tls() if url.scheme == "https" else None
    reader, writer = await asyncio.open_connection(
        address, url.port, ssl=secure, server_hostname=url.host if secure else None
    )
    reply = _Reply()
    parser = httptools.HttpResponseParser(reply)
    try:
        head = f"GET {url.target} HTTP/1.1\r\nHost: {url.name}\r\nUser-Agent: pagoda\r\nAccept: image/*, video/*\r\n"
        writer.write(f"{head}Accept-Encoding: identity\r\nConnection: close\r\n\r\n".encode("ascii"))
        await writer.drain()
        seen_bytes = 0
        while not reply.complete and (data := await reader.read(_READ_BYTES)):
            parser.feed_data(data)
            reply.status = parser.get_status_code()
            seen_bytes += len(data)
            if reply.size_bytes > MAX_BYTES or seen_bytes > MAX_BYTES + MAX_HEADER_BYTES:
                raise _failed(where, f"it is larger than {MAX_BYTES >> 20} MiB")
            if reply.status in _REDIRECTS and "location" in reply.headers:
                break
    finally:
        writer.close()
    claimed = reply.headers.get("content-length")
    if claimed is not None and reply.status == 200 and claimed != str(reply.size_bytes):
        raise _failed(where, "it broke off")
    return reply


def _body(where: str, reply: _Reply) -> bytes:
    if reply.status != 200:
        raise _failed(where, f"its server answers with status {reply.status}")
    if not reply.parts:
        raise _failed(where, "it is empty")
    return b"".join(reply.parts)


@cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def read_file(where: str, url: str, folder: str | None) -> bytes:
    """A file that a file:// URL names, which must lie below the folder, and be a plain one."""
    if folder is None:
        raise BadRequest(
            f"{where}: this server reads no files",
            remedy="Send it as a data: URI, or start the server with --allowed-local-media-path FOLDER",
            param="messages",
        )
    outside = BadRequest(f"{where}: there is no such file below --allowed-local-media-path", param="messages")
    found = re.fullmatch(r"file://(?:localhost)?(/[^?#]*)", url, re.IGNORECASE)
    path = unquote(found[1]) if found is not None else ""
    root = Path(folder).resolve()
    if not path or "\0" in path or root not in Path(path).resolve().parents:
        raise outside
    try:
        handle = os.open(Path(path).resolve(), os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        raise outside from None
    with open(handle, "rb") as file:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode) or root not in _place(handle, path).parents:
            raise outside
        if status.st_size > MAX_BYTES:
            raise BadRequest(f"{where}: the file is larger than {MAX_BYTES >> 20} MiB", param="messages")
        return file.read(MAX_BYTES + 1)


def _place(handle: int, path: str) -> Path:
    """Where an open file really is, if the system tells: a folder may have become a link while it was opened."""
    try:
        return Path(os.readlink(f"/proc/self/fd/{handle}"))
    except OSError:
        return Path(path).resolve()
