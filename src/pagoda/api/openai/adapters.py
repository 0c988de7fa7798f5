"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter: adapters beside the served model, while it runs."""

from __future__ import annotations

import asyncio
import re

import msgspec
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from pagoda.api.http.body import parse, read_body
from pagoda.api.serving.access import check_may_change
from pagoda.api.serving.endpoint import Endpoint
from pagoda.api.serving.server import Server
from pagoda.errors import BadRequest

_NAME = re.compile(r"[\w][\w.\-]*(/[\w][\w.\-]*)*(:[\w][\w.\-]*)?", re.ASCII)
_MAX_NAME_CHARS, _MAX_PATH_CHARS = 200, 4096


class LoadBody(msgspec.Struct, kw_only=True):
    lora_name: str
    lora_path: str
    load_inplace: bool = False


class UnloadBody(msgspec.Struct, kw_only=True):
    lora_name: str
    lora_int_id: int | None = None


def endpoints() -> tuple[Endpoint, ...]:
    """Of a server whose clients may load adapters; others have no such routes."""
    return (
        Endpoint("/load_lora_adapter", ("POST",), load, "Load a LoRA adapter", LoadBody, openai=True),
        Endpoint("/unload_lora_adapter", ("POST",), unload, "Unload a LoRA adapter", UnloadBody, openai=True),
    )


async def load(server: Server, request: Request) -> Response:
    body, ignored = parse(await read_body(request), LoadBody)
    check_may_change(server)
    if len(body.lora_name) > _MAX_NAME_CHARS or not _NAME.fullmatch(body.lora_name):
        raise BadRequest("lora_name must be a name of letters, digits, '.', '-', '_' and '/'", param="lora_name")
    if not body.lora_path or len(body.lora_path) > _MAX_PATH_CHARS or "\0" in body.lora_path:
        raise BadRequest("lora_path must be the path of an adapter", param="lora_path")
    await asyncio.to_thread(server.adapters.load, body.lora_name, body.lora_path, again=body.load_inplace)
    return _said(server, f"Success: LoRA adapter '{body.lora_name}' added successfully.", ignored)


async def unload(server: Server, request: Request) -> Response:
    body, ignored = parse(await read_body(request), UnloadBody)
    check_may_change(server)
    server.adapters.unload(body.lora_name)
    return _said(server, f"Success: LoRA adapter '{body.lora_name}' removed successfully.", ignored)


def _said(server: Server, text: str, ignored: list[str]) -> Response:
    reply = PlainTextResponse(text)
    server.dress(reply, ignored)
    return reply
