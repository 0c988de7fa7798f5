"""Who may ask: API keys, and the Host and Origin headers where the server is for this machine only."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request

from pagoda.errors import PagodaError, RateLimited, Unauthorized

_LOCAL_NAMES = ("localhost", "host.docker.internal", "testserver")


class Forbidden(PagodaError):
    status = 403
    code = "forbidden"
    type = "PermissionDeniedError"


CALLER = "pagoda.caller"
"""In a request's scope: whose key it came with, as a name that does not tell the key; None where no key is needed."""


class Keys:
    """The keys that are accepted. Only their digests are kept; without any key everybody may ask.

    `most_calls` is how many calls of a model one key may have here at once.
    """

    def __init__(self, keys: Sequence[str], most_calls: int | None = None) -> None:
        self._digests = [_digest(key) for key in keys if key]
        self._most_calls = most_calls
        self._calls: Counter[str | None] = Counter()

    def check(self, headers: Headers) -> str | None:
        """Who calls. Raises Unauthorized unless one of the configured keys was sent as Bearer or x-api-key."""
        if not self._digests:
            return None
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        sent = [bearer.strip()] if scheme.lower() == "bearer" else []
        sent.append(headers.get("x-api-key", ""))
        # All pairs are compared, always: the time says nothing about which key was near.
        matches = [digest for key in sent for digest in self._digests if hmac.compare_digest(_digest(key), digest)]
        if not matches:
            raise Unauthorized(
                "this server needs an API key, and the request holds none that it knows",
                remedy="Send the header Authorization: Bearer KEY",
            )
        return hashlib.sha256(matches[0]).hexdigest()[:16]

    @contextmanager
    def call(self, caller: str | None) -> Iterator[None]:
        """Room for one call of a model. Raises RateLimited where this key has as many as it may have."""
        if caller is not None and self._most_calls is not None and self._calls[caller] >= self._most_calls:
            raise RateLimited(
                f"rate limit: {self._most_calls} requests with this API key are here already",
                remedy="Wait for one of them, or ask for a larger --max-requests-per-key",
            )
        self._calls[caller] += 1
        try:
            yield
        finally:
            self._calls[caller] -= 1


def caller_of(request: Request) -> str | None:
    caller: str | None = request.scope.get(CALLER)
    return caller


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
