"""Is it alive, what is it, how is it doing: /, /health, /ping, /version, /metrics."""

from __future__ import annotations

import base64
import functools
import hashlib
from pathlib import Path
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from pagoda.api.http.errors import JSON, to_json
from pagoda.api.serving.server import Server


class StatusReply(msgspec.Struct, kw_only=True):
    status: str


class VersionReply(msgspec.Struct, kw_only=True):
    version: str


class ServerLoad(msgspec.Struct, kw_only=True):
    """vLLM's name for the requests that are here now."""

    server_load: int


class ServerInfo(msgspec.Struct, kw_only=True):
    version: str
    models: list[str]
    state: str
    engine: dict[str, Any]


class Welcome(msgspec.Struct, kw_only=True):
    name: str
    version: str
    status: str
    models: list[str]
    endpoints: list[str]


_PAGE = Path(__file__).with_name("page")
_SCRIPTS = ("words.js", "markdown.js", "api.js", "live.js", "chat.js", "main.js")


async def health(server: Server, request: Request) -> Response:
    """200 when requests are answered; 503 while loading, restarting or shutting down."""
    ready = server.state == "ready"
    headers = {} if ready else {"retry-after": "1"}
    return Response(to_json(StatusReply(status=server.state)), 200 if ready else 503, headers, JSON)


async def version(server: Server, request: Request) -> Response:
    return Response(to_json(VersionReply(version=server.version)), media_type=JSON)


async def load(server: Server, request: Request) -> Response:
    return Response(to_json(ServerLoad(server_load=server.live_calls)), media_type=JSON)


async def server_info(server: Server, request: Request) -> Response:
    """What is served, how, and on what."""
    engine = msgspec.to_builtins(server.engine.info)
    reply = ServerInfo(version=server.version, models=list(server.served.names), state=server.state, engine=engine)
    return Response(to_json(reply), media_type=JSON)


async def metrics(server: Server, request: Request) -> Response:
    return Response(server.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def root(server: Server, request: Request) -> Response:
    """A page for people, JSON for programs, and for Ollama's clients what they look for before anything else."""
    if request.method == "HEAD" or request.headers.get("user-agent", "").startswith("ollama"):
        return Response("Ollama is running", media_type="text/plain")
    if wants_page(request):
        return page()
    reply = Welcome(
        name="pagoda",
        version=server.version,
        status=server.state,
        models=list(server.served.names),
        endpoints=["/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics", "/docs"],
    )
    return Response(to_json(reply), media_type=JSON)


def wants_page(request: Request) -> bool:
    return "text/html" in request.headers.get("accept", "")


def page(status: int = 200) -> Response:
    """The page at /. It holds nothing of this server; what it shows it asks for, with the key that is typed there."""
    body, policy = _assembled()
    return _response(body, f"{policy}; connect-src 'self'; img-src data:", status)


@functools.cache
def _assembled() -> tuple[bytes, str]:
    """One document made of the files in page/, so that it needs no other request, and the policy that lets it run."""
    style = "\n" + (_PAGE / "style.css").read_text("utf-8")
    script = '\n"use strict";\n' + "".join((_PAGE / name).read_text("utf-8") for name in _SCRIPTS)
    text = (_PAGE / "index.html").read_text("utf-8")
    text = text.replace("<!-- style -->", f"<style>{style}</style>")
    text = text.replace("<!-- script -->", f"<script>{script}</script>")
    return text.encode(), f"style-src {_digest(style)}; script-src {_digest(script)}"


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def page_response(body: bytes) -> Response:
    """A page of plain HTML with its style inside; it runs no script."""
    return _response(body, "style-src 'unsafe-inline'")


def _response(body: bytes, policy: str, status: int = 200) -> Response:
    """A page that loads nothing from elsewhere, and whose browser holds it to that."""
    policy = f"default-src 'none'; {policy}; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    headers = {"content-security-policy": policy, "x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}
    return Response(body, status, headers, "text/html")
