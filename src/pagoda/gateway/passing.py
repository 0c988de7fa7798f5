"""One request as the gateway sees it: what it asks for, and how it is written on the way to whoever answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from pagoda.api.http.body import read_body
from pagoda.api.http.dialect import Dialect
from pagoda.api.http.errors import JSON, ErrorDetail, to_json
from pagoda.api.ollama.protocol import (
    OLLAMA,
    OllamaChatReply,
    OllamaGenerateReply,
    OllamaMessage,
    OllamaMetrics,
    line,
    timestamp,
)
from pagoda.api.serving.endpoint import Endpoint
from pagoda.gateway.wire import as_json

_CREDENTIALS = frozenset(("authorization", "x-api-key"))
_NOT_FORWARDED = frozenset(("host", "origin", "cookie", "connection")) | _CREDENTIALS
CHANGES = frozenset(("/api/blobs/{digest}", "/api/create", "/api/copy", "/api/delete", "/api/pull", "/api/push"))
"""These change what is on this machine, and under which names."""
_MAY_ASK_NOTHING = frozenset(("/api/chat", "/api/generate"))


class Asked(msgspec.Struct, rename={"from_": "from"}):
    """What the gateway reads of a body; its model's own server reads the rest."""

    model: str | None = None
    from_: str | None = None
    source: str | None = None
    destination: str | None = None
    name: str | None = None
    stream: bool | None = None
    keep_alive: Any = None
    messages: Any = None
    prompt: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Passing:
    """`path` is ours, without /v1; `shown` is how other servers have it. `model` None means any, or the first.

    `credentials` are the headers with the client's key: for servers of ours only.
    """

    endpoint: Endpoint
    request: Request
    path: str
    shown: str
    headers: Mapping[str, str]
    credentials: Mapping[str, str]
    body: bytes
    asked: Asked

    @property
    def method(self) -> str:
        return self.request.method

    @property
    def dialect(self) -> Dialect:
        return self.endpoint.dialect

    @property
    def model(self) -> str | None:
        made_of = {"/api/create": self.asked.from_, "/api/copy": self.asked.source}
        return made_of.get(self.endpoint.path) or self.asked.model or self.asked.name

    @property
    def new_name(self) -> str | None:
        """The name that a model is to get."""
        if self.endpoint.path == "/api/copy":
            return self.asked.destination
        return self.asked.model or self.asked.name if self.endpoint.path == "/api/create" else None

    @property
    def streams(self) -> bool:
        """Whether events are wanted: Ollama's clients must say so if not, all others if so."""
        if not self.endpoint.tasks or self.endpoint.event is None:
            return False
        return self.dialect is OLLAMA if self.asked.stream is None else self.asked.stream

    @property
    def asks_nothing(self) -> bool:
        """Ollama's way to have a model loaded or unloaded."""
        return self.endpoint.path in _MAY_ASK_NOTHING and not (self.asked.messages or self.asked.prompt)

    def renamed(self, model: str) -> Passing:
        """The same for a model that is called so."""
        content = as_json(self.body)
        body = self.body if not isinstance(content, dict) else to_json({**content, "model": model})
        return replace(self, body=body)


async def read(endpoint: Endpoint, request: Request) -> Passing:
    """Take the request in, with its whole body. A body that cannot be read is left to the one who answers."""
    body = await read_body(request)
    try:
        asked = msgspec.json.decode(body, type=Asked)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        asked = Asked()
    query = request.scope.get("query_string", b"").decode("latin-1")
    # The path in the scope is decoded: what were line breaks in it would begin a request of its own.
    path = quote(request.scope["path"], safe="/:@!$&'()*+,;=") + (f"?{query}" if query else "")
    return Passing(
        endpoint=endpoint,
        request=request,
        path=path,
        shown=f"/v1{path}" if endpoint.openai else path,
        headers={name: value for name, value in request.headers.items() if name not in _NOT_FORWARDED},
        credentials={name: value for name, value in request.headers.items() if name in _CREDENTIALS},
        body=body,
        asked=asked,
    )


def unloaded(passing: Passing) -> Response:
    """The answer to a request to unload what is not loaded."""
    name, message = passing.model or "", OllamaMessage(content="")
    reply: OllamaMetrics = OllamaGenerateReply(model=name, created_at=timestamp(), response="", done=True)
    if passing.endpoint.path == "/api/chat":
        reply = OllamaChatReply(model=name, created_at=timestamp(), message=message, done=True)
    reply.done_reason = "unload"
    if passing.streams:
        return Response(line(reply), media_type=OLLAMA.media_type)
    return Response(to_json(reply), media_type=JSON)


def error_of(body: bytes) -> ErrorDetail:
    """The error in a body, in OpenAI's or in Ollama's shape."""
    content = as_json(body)
    given = content.get("error") if isinstance(content, dict) else None
    told = given if isinstance(given, dict) else {"message": given or body[:200].decode("utf-8", "replace")}
    return ErrorDetail(
        message=str(told.get("message") or "no reason was given"),
        type=str(told.get("type") or "UpstreamError"),
        param=None,
        code=str(told.get("code") or "upstream_error"),
    )
