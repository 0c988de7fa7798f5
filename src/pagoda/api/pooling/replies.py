"""The reply to a call of a pooled model, whatever its shape."""

from __future__ import annotations

from collections.abc import Coroutine, Sequence
from typing import Any

import msgspec
from starlette.requests import Request

from pagoda.api.http.stream import Reply, answer
from pagoda.api.serving.generation import Pooled
from pagoda.api.serving.server import Server


async def reply_to(
    server: Server, request: Request, call: Pooled, work: Coroutine[Any, Any, msgspec.Struct], ignored: Sequence[str]
) -> Reply:
    """What the work gives, as JSON; `ignored` are the fields of the body that have no effect here."""
    reply = await answer(call, work, request.receive, server.aborted)
    server.dress(reply, ignored, call)
    return reply
