"""Who may ask: API keys, and the Host and Origin headers where the server is for this machine only."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from pagoda.errors import PagodaError, Unauthorized

_LOCAL_NAMES = ("localhost", "host.docker.internal", "testserver")


class Forbidden(PagodaError):
    status = 403
    code = "forbidden"
    type = "PermissionDeniedError"


class Keys:
    """The keys that are accepted. Only their digests are kept; without any key everybody may ask."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [_digest(key) for key in keys if key]

    def check(self, headers: Headers) -> None:
        """Raise Unauthorized unless one of the configured keys was sent as Bearer or x-api-key."""
        if not self._digests:
            return
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        sent = [bearer.strip()] if scheme.lower() == "bearer" else []
        sent.append(headers.get("x-api-key", ""))
        # All pairs are compared, always: the time says nothing about which key was near.
        matches = [hmac.compare_digest(_digest(key), digest) for key in sent for digest in self._digests]
        if not any(matches):
            raise Unauthorized(
                "this server needs an API key, and the request holds none that it knows",
                remedy="Send the header Authorization: Bearer KEY",
            )


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def check_host(headers: Headers, allowed_origins: Sequence[str]) -> None:
    """Raise Forbidden for foreign Host names (DNS rebinding) and for web pages from elsewhere."""
    host = headers.get("host", "")
    if host and not _is_local(_host_name(host)):
        raise Forbidden(
            f"the Host header names {host[:100]!r}, but this server answers to this machine only",
            remedy="Use localhost or 127.0.0.1, or start the server with --host 0.0.0.0",
        )
    origin = headers.get("origin")
    if origin is None or "*" in allowed_origins or origin in allowed_origins:
        return
    if not _is_local(urlsplit(origin).hostname or ""):
        raise Forbidden(
            f"web pages from {origin[:100]!r} may not use this server",
            remedy="Start it with --allowed-origins to let them",
        )


def _host_name(host: str) -> str:
    """The name in a Host header: without the port, and without the brackets of an IPv6 address."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if ":" in host else host


def _is_local(name: str) -> bool:
    name = name.lower().rstrip(".")
    if name in _LOCAL_NAMES or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
