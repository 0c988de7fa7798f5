"""GET and DELETE /v1/responses/{id}, its input items, and cancelling one that runs in the background."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import Response

from pagoda.api.http.errors import JSON, to_json
from pagoda.api.http.query import choice, number
from pagoda.api.responses.protocol import InputItems, ResponseDeleted
from pagoda.api.serving.server import Server
from pagoda.errors import BadRequest, NotFound

MAX_PAGE = 100


async def get_response(server: Server, request: Request) -> Response:
    stored = server.responses.get(request.path_params["response_id"])
    if choice(request, "stream", ("true", "false"), "false") == "true":
        raise BadRequest("stream: a stored response can't be streamed again", remedy="Leave stream out", param="stream")
    return Response(to_json(stored.reply), media_type=JSON)


async def delete_response(server: Server, request: Request) -> Response:
    response_id = request.path_params["response_id"]
    server.responses.delete(response_id)
    return Response(to_json(ResponseDeleted(id=response_id)), media_type=JSON)


async def cancel_response(server: Server, request: Request) -> Response:
    """Stop a response that runs in the background. One that is over stays as it ended."""
    stored = server.responses.get(request.path_params["response_id"])
    if stored.task is None:
        raise BadRequest(
            "only a response made with background: true can be cancelled",
            remedy="To end another one, close its connection",
        )
    stored.task.cancel()
    await asyncio.wait([stored.task])
    return Response(to_json(stored.reply), media_type=JSON)


async def input_items(server: Server, request: Request) -> Response:
    """What the response was made from, earlier turns too; the latest first, unless `order` is asc."""
    items = server.responses.get(request.path_params["response_id"]).items
    if choice(request, "order", ("asc", "desc"), "desc") == "desc":
        items = items[::-1]
    after = request.query_params.get("after")
    if after:
        ids = [item["id"] for item in items]
        if after not in ids:
            raise NotFound(f"after: there is no item {after[:80]!r} in this response", param="after")
        items = items[ids.index(after) + 1 :]
    limit = number(request, "limit", 20, 1, MAX_PAGE)
    page = items[:limit]
    reply = InputItems(
        data=page,
        first_id=page[0]["id"] if page else None,
        last_id=page[-1]["id"] if page else None,
        has_more=len(items) > limit,
    )
    return Response(to_json(reply), media_type=JSON)
