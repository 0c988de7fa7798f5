"""One line of a batch: read, asked of this server's own routes without a connection, written as a result."""

from __future__ import annotations

import asyncio
import logging
import secrets

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message

from pagoda.api.batch.batches import BATCHED
from pagoda.api.batch.protocol import BatchLine, BatchResult, LineError, LineResponse
from pagoda.api.http.body import parse
from pagoda.api.http.errors import error_response
from pagoda.api.openai import routes as openai
from pagoda.api.pooling import routes as pooling
from pagoda.api.responses import routes as responses
from pagoda.api.serving.server import LOW_PRIORITY, Server
from pagoda.api.serving.tasks import check_task
from pagoda.errors import BadRequest, EngineError, Overloaded, PagodaError

MAX_CUSTOM_ID = 512
_BUSY_S = 0.5

log = logging.getLogger("pagoda.api")


def read_line(raw: bytes) -> BatchLine:
    """Raises BadRequest for what is no request of a batch."""
    line, _ = parse(raw, BatchLine)
    if not 0 < len(line.custom_id) <= MAX_CUSTOM_ID:
        raise BadRequest(f"custom_id must have 1 to {MAX_CUSTOM_ID} characters", param="custom_id")
    if line.method != "POST":
        raise BadRequest("method must be POST", param="method")
    if line.url not in BATCHED:
        raise BadRequest(f"url must be one of {', '.join(BATCHED)}", param="url")
    return line


async def ask(server: Server, line: BatchLine, priority: int = LOW_PRIORITY) -> BatchResult:
    """Its answer; a server that is busy is asked again. Cancelling this cancels the request."""
    while True:
        try:
            response = await _respond(server, line, priority)
            break
        except Overloaded:
            if server.draining:
                raise
            await asyncio.sleep(_BUSY_S)
    request_id = response.headers.get("x-request-id") or f"req_{secrets.token_hex(12)}"
    body = msgspec.Raw(bytes(response.body))
    told = LineResponse(status_code=response.status_code, request_id=request_id, body=body)
    return BatchResult(id=_result_id(), custom_id=line.custom_id, response=told)


def failed(custom_id: str | None, code: str, message: str) -> BatchResult:
    """The result of a line that was never asked."""
    return BatchResult(id=_result_id(), custom_id=custom_id, response=None, error=LineError(code=code, message=message))


def _result_id() -> str:
    return f"batch_req_{secrets.token_hex(12)}"


async def _respond(server: Server, line: BatchLine, priority: int) -> Response:
    endpoints = (*openai.endpoints(), *responses.endpoints(), *pooling.endpoints())
    endpoint = next((each for each in endpoints if each.shown == line.url), None)
    try:
        if endpoint is None:
            raise BadRequest(f"{line.url} is not served here", param="url")
        check_task(server, endpoint.tasks)
        body = {**line.body, "stream": False, "priority": priority}
        if line.url == "/v1/responses":  # its answer is in the batch's output, and not in the place of clients' own
            body |= {"background": False, "store": False}
        reply = await endpoint.handler(server, _request(line.url, msgspec.json.encode(body)))
        if not isinstance(reply, Response):
            raise BadRequest("a batch has no streams: leave stream out", param="stream")
        return reply
    except Overloaded:
        raise
    except PagodaError as error:
        return error_response(error)
    except Exception:
        log.exception("a request of a batch failed")
        return error_response(EngineError("the server failed on this request; its log says why"))


def _request(path: str, body: bytes) -> Request:
    """A request as if it had come over a connection that stays open."""
    sent = False

    async def receive() -> Message:
        nonlocal sent
        if sent:
            await asyncio.Event().wait()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    headers = [(b"content-type", b"application/json")]
    return Request({"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": headers}, receive)
