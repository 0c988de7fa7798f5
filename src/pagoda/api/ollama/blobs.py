"""HEAD and POST /api/blobs: files that clients put here to make models of, and what such a model is made of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from pagoda.api.http.body import stream_body
from pagoda.api.ollama.options import NotSupported
from pagoda.api.serving.access import check_may_change
from pagoda.api.serving.blobs import MAX_BLOB_BYTES, BlobStore
from pagoda.api.serving.hub import Hub
from pagoda.api.serving.server import Server
from pagoda.errors import BadRequest, NotFound, PagodaError

MODEL, ENCODER, TEMPLATE = "model.gguf", "mmproj.gguf", "chat_template.jinja"
MAX_FILES = 16


async def has_blob(server: Server, request: Request) -> Response:
    return found_in(_places(server)[0], request)


async def take_blob(server: Server, request: Request) -> Response:
    check_may_change(server)
    return await taken_into(_places(server)[0], request)


def found_in(store: BlobStore, request: Request) -> Response:
    if store.find(request.path_params["digest"]) is None:
        raise NotFound("no file with this digest is here")
    return Response(status_code=200)


async def taken_into(store: BlobStore, request: Request) -> Response:
    digest = request.path_params["digest"]
    if store.find(digest) is not None:
        return Response(status_code=200)
    claimed = request.headers.get("content-length", "")
    claimed_bytes = int(claimed) if claimed.isdigit() and len(claimed) < 16 else 1
    await store.take(digest, stream_body(request, MAX_BLOB_BYTES), claimed_bytes)
    return Response(status_code=201)


def files_of(server: Server, given: Mapping[str, Any]) -> dict[str, Path]:
    """The files of a model by the names that they get: its own, and its image encoder. BadRequest for others."""
    (store, hub), found = _places(server), dict[str, Path]()
    if len(given) > MAX_FILES:
        raise BadRequest(f"files: a model has at most {MAX_FILES}", param="files")
    for name, digest in given.items():
        path = store.find(digest) if isinstance(digest, str) else None
        if path is None:
            raise BadRequest(
                f"files: {name[:80]!r} is not here", remedy="Send it first: POST /api/blobs/DIGEST", param="files"
            )
        own = _kind(hub, path, name)
        if own in found:
            raise BadRequest("files: one GGUF file is a model, and one its image encoder", param="files")
        found[own] = path
    if MODEL not in found:
        raise BadRequest("files: a model needs its GGUF file", param="files")
    return found


def _kind(hub: Hub, path: Path, name: str) -> str:
    try:
        architecture = hub.architecture(path)
    except PagodaError as error:
        reason = error.message.replace(str(path), "it")  # where this server keeps its files is its own business
        raise BadRequest(f"files: {name[:80]!r}: {reason}", remedy="Send a whole GGUF file", param="files") from None
    if architecture is None:
        raise BadRequest(f"files: {name[:80]!r} is no GGUF file", param="files")
    return ENCODER if architecture == "clip" else MODEL


def _places(server: Server) -> tuple[BlobStore, Hub]:
    if server.blobs is None or server.hub is None:
        raise NotSupported(
            "this server takes no model files", remedy="Put the file on its machine and type pagoda serve FILE.gguf"
        )
    return server.blobs, server.hub
