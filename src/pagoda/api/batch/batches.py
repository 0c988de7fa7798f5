"""/v1/batches: create, list, look at and cancel."""

from __future__ import annotations

import asyncio
import re

from starlette.requests import Request
from starlette.responses import Response

from pagoda.api.batch.files import batches_of, page_of
from pagoda.api.batch.protocol import Batch, BatchBody, BatchList, shown
from pagoda.api.http.auth import caller_of
from pagoda.api.http.body import parse, read_body
from pagoda.api.http.errors import JSON, to_json
from pagoda.api.serving.server import Server
from pagoda.errors import BadRequest

BATCHED = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings")
MAX_METADATA = 16
_HOURS = {"h": 1, "d": 24}


async def create_batch(server: Server, request: Request) -> Response:
    body, ignored = parse(await read_body(request), BatchBody)
    batches = batches_of(server)
    if body.endpoint not in BATCHED:
        raise BadRequest(f"endpoint must be one of {', '.join(BATCHED)}", param="endpoint")
    window = re.fullmatch(r"([1-9][0-9]{0,2})([hd])", body.completion_window, re.ASCII)
    if window is None:
        raise BadRequest("completion_window must be a time such as 24h or 7d", param="completion_window")
    if len(body.metadata or {}) > MAX_METADATA:
        raise BadRequest(f"metadata takes at most {MAX_METADATA} entries", param="metadata")
    found = batches.files.find(body.input_file_id, caller_of(request))
    if found is None or found.purpose != "batch":
        raise BadRequest(
            f"input_file_id: there is no file {body.input_file_id[:80]!r} of purpose batch",
            remedy="Upload it first: POST /v1/files",
            param="input_file_id",
        )
    window_s = int(window[1]) * _HOURS[window[2]] * 3600
    given = (body.endpoint, found.id, body.completion_window, window_s, body.metadata or {}, caller_of(request) or "")
    batch = await asyncio.to_thread(batches.create, *given)
    batches.changed.set()
    response = Response(to_json(shown(batch, Batch)), media_type=JSON)
    server.dress(response, ignored)
    return response


async def list_batches(server: Server, request: Request) -> Response:
    page, more = page_of(request, [shown(each, Batch) for each in batches_of(server).list(caller_of(request))], 20, 100)
    reply = BatchList(
        data=page, first_id=page[0].id if page else None, last_id=page[-1].id if page else None, has_more=more
    )
    return Response(to_json(reply), media_type=JSON)


async def get_batch(server: Server, request: Request) -> Response:
    found = batches_of(server).get(request.path_params["batch_id"], caller_of(request))
    return Response(to_json(shown(found, Batch)), media_type=JSON)


async def cancel_batch(server: Server, request: Request) -> Response:
    """What is finished stays in the output. A batch that is over can't be cancelled."""
    batches = batches_of(server)
    batch = batches.get(request.path_params["batch_id"], caller_of(request))
    if batch.is_over or batch.status == "finalizing":
        raise BadRequest(f"the batch is {batch.status} already", param="batch_id")
    if batch.status != "cancelling":
        await batches.enter(batch, "cancelling")
        batches.changed.set()
    return Response(to_json(shown(batch, Batch)), media_type=JSON)
