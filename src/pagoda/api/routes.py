"""The table of all routes: what the router, the key check, the 404 texts and the documentation are made from."""

from __future__ import annotations

from starlette.requests import Request

from pagoda.api import docs, invocations, status
from pagoda.api.anthropic import routes as anthropic
from pagoda.api.batch import routes as batch
from pagoda.api.http.stream import Reply
from pagoda.api.ollama import routes as ollama
from pagoda.api.openai import routes as openai
from pagoda.api.pooling import routes as pooling
from pagoda.api.responses import routes as responses
from pagoda.api.serving.endpoint import Endpoint
from pagoda.api.serving.server import Server
from pagoda.api.serving.tasks import ALL
from pagoda.api.status import ServerInfo, ServerLoad, StatusReply, VersionReply, Welcome


def endpoints() -> tuple[Endpoint, ...]:
    """Every route of the server. What is not here does not exist."""
    dialects = (openai, responses, pooling, batch, anthropic, ollama)
    return (*(each for dialect in dialects for each in dialect.endpoints()), *_status())


def _status() -> tuple[Endpoint, ...]:
    return (
        Endpoint("/health", ("GET",), status.health, "200 when ready", reply=StatusReply, public=True),
        Endpoint("/ping", ("GET", "POST"), status.health, "The same as /health", reply=StatusReply, public=True),
        Endpoint("/invocations", ("POST",), invocations.invocations, "SageMaker's name for all others", tasks=ALL),
        Endpoint("/version", ("GET",), status.version, "Pagoda's version", reply=VersionReply),
        Endpoint("/load", ("GET",), status.load, "Requests that are here now", reply=ServerLoad),
        Endpoint("/server_info", ("GET",), status.server_info, "Model, device, sizes", reply=ServerInfo),
        Endpoint("/metrics", ("GET",), status.metrics, "Prometheus metrics under vLLM's names", media=("text/plain",)),
        Endpoint(
            "/", ("GET",), status.root, "A page, JSON for programs",
            reply=Welcome, sign_in=True, media=("text/html", "text/plain"),
        ),
        Endpoint("/docs", ("GET",), docs_page, "This list", media=("text/html",)),
        Endpoint("/openapi.json", ("GET",), openapi_json, "The OpenAPI 3.1 description"),
    )  # fmt: skip


async def docs_page(server: Server, request: Request) -> Reply:
    return status.page_response(docs.page(docs.openapi(endpoints(), server.version)))


async def openapi_json(server: Server, request: Request) -> Reply:
    return docs.openapi_response(docs.openapi(endpoints(), server.version))
