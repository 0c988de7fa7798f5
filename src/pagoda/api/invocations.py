"""POST /invocations, SageMaker's one route for all models: what the body holds says which other route is meant."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request

from pagoda.api.http.body import read_body
from pagoda.api.http.stream import Reply
from pagoda.api.openai import routes as openai
from pagoda.api.pooling import routes as pooling
from pagoda.api.serving.server import Server
from pagoda.api.serving.tasks import check_task
from pagoda.errors import BadRequest

_ROUTES = (
    ("messages", "/chat/completions"),
    ("prompt", "/completions"),
    ("documents", "/rerank"),
    ("queries", "/score"),
    ("text_1", "/score"),
    ("input", "/embeddings"),
)
_OF_SCORES = {"/embeddings": "/classify"}
"""What a field means where the model gives scores."""


async def invocations(server: Server, request: Request) -> Reply:
    body = await read_body(request)
    path = _path(body)
    if server.engine.info.task == "score":
        path = _OF_SCORES.get(path, path)
    (endpoint,) = (each for each in (*openai.endpoints(), *pooling.endpoints()) if each.path == path)
    check_task(server, endpoint.tasks)
    return await endpoint.handler(server, _with_body(request, body))


def _path(body: bytes) -> str:
    try:
        given = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return "/chat/completions"  # it says what is wrong with the body
    found = next((path for name, path in _ROUTES if name in given), None)
    if found is None:
        names = ", ".join(name for name, _ in _ROUTES)
        raise BadRequest(
            f"the body must hold one of {names}", remedy="It then means what it does on that field's route"
        )
    return found


def _with_body(request: Request, body: bytes) -> Request:
    """The same request, whose body can be read once more."""
    given: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Any:
        return given.pop() if given else await request.receive()

    return Request(request.scope, receive)
