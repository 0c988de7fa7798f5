"""One path for each endpoint, however clients build their URLs: doubled slashes, `/v1/v1`, an endpoint said twice."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

_TWICE = re.compile(r"^/(?:chat/completions|completions|embeddings|responses)/(?:v1/)?(.+)$")


def normalize(path: str, endpoints: Sequence[str]) -> str:
    """The path without `/v1`, as the route table has it. `endpoints` are the paths of that table."""
    path = re.sub(r"/{2,}", "/", "/" + path)
    if len(path) > 1:
        path = path.rstrip("/") or "/"
    while path == "/v1" or path.startswith("/v1/"):
        path = path[3:] or "/"
    again = _TWICE.match(path)
    if again and "/" + again.group(1) in endpoints:
        return "/" + again.group(1)
    return path


def nearest(path: str, endpoints: Sequence[str]) -> str | None:
    """The endpoint that somebody who typed `path` most likely meant."""
    for endpoint in sorted(endpoints, key=len, reverse=True):
        if len(endpoint) > 1 and path.endswith(endpoint):
            return endpoint
    found = difflib.get_close_matches(path, [end for end in endpoints if len(end) > 1], 1, 0.75)
    return found[0] if found else None


def typed_path(scope: Scope) -> str:
    """The path as the client wrote it, for messages."""
    raw: bytes = scope.get("raw_path") or scope["path"].encode()
    return raw.decode("ascii", "replace")[:200]


class NormalizePath:
    """Rewrites the path before routing, so that everything after it, the key check too, sees only one spelling."""

    def __init__(self, app: ASGIApp, endpoints: Sequence[str], root_path: str = "") -> None:
        self._app = app
        self._root_path = "/" + root_path.strip("/") if root_path.strip("/") else ""
        self._endpoints = endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = scope["path"]
            # A proxy takes the prefix away; whoever comes past the proxy may still send it.
            if self._root_path and path.startswith(self._root_path + "/"):
                path = path[len(self._root_path) :]
            scope = {**scope, "path": normalize(path, self._endpoints)}
        await self._app(scope, receive, send)
