"""Errors in OpenAI's shape, as bodies and as responses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from starlette.responses import Response

from pagoda.errors import Overloaded, PagodaError, Unauthorized

JSON = "application/json"


class ErrorDetail(msgspec.Struct, kw_only=True):
    message: str
    type: str
    param: str | None
    code: str


class ErrorReply(msgspec.Struct, kw_only=True):
    error: ErrorDetail


class ShuttingDown(Overloaded):
    code = "shutting_down"
    retry_after_s = 5


class DeadlineExceeded(PagodaError):
    """The time that the client gave for an answer is over; asking again would take as long."""

    status = 504
    code = "deadline_exceeded"
    type = "TimeoutError"


def to_json(body: msgspec.Struct | dict[str, Any]) -> bytes:
    return msgspec.json.encode(body)


def error_reply(error: PagodaError) -> ErrorReply:
    detail = ErrorDetail(message=str(error), type=error.type, param=error.param, code=error.code)
    return ErrorReply(error=detail)


def error_response(
    error: PagodaError,
    headers: Mapping[str, str] | None = None,
    body: Callable[[ErrorDetail], msgspec.Struct] | None = None,
) -> Response:
    """The error as an HTTP response, with the headers that go with its kind; `body` puts it in another dialect."""
    more = dict(headers or {})
    if isinstance(error, Overloaded):
        more["retry-after"] = str(error.retry_after_s)
    if error.status == 504:
        more["x-should-retry"] = "false"  # asking again would take as long
    if isinstance(error, Unauthorized):
        more["www-authenticate"] = "Bearer"
    if error.status in (408, 413):
        # Part of the body may still be on its way; it must not be read as the next request.
        more["connection"] = "close"
    reply = error_reply(error)
    return Response(to_json(reply if body is None else body(reply.error)), error.status, more, JSON)
