"""HEAD and POST /api/blobs: files that clients put here to make models of, and what such a model is made of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from starlette.requests import Request
from starlette.responses import Response

from pagoda.api.http.body import stream_body
from pagoda.api.ollama.options import NotSupported
from pagoda.api.serving.access import check_may_change
from pagoda.api.serving.blobs import MAX_BLOB_BYTES, BlobStore
from pagoda.api.serving.server import Server
from pagoda.errors import BadRequest, NotFound, PagodaError
from pagoda.text.chat import ChatTemplate
from pagoda.weights.open import open_source

MODEL, ENCODER, TEMPLATE = "model.gguf", "mmproj.gguf", "chat_template.jinja"
MAX_FILES = 16


async def has_blob(server: Server, request: Request) -> Response:
    if _store(server).find(request.path_params["digest"]) is None:
        raise NotFound("no file with this digest is here")
    return Response(status_code=200)


async def take_blob(server: Server, request: Request) -> Response:
    check_may_change(server)
    store, digest = _store(server), request.path_params["digest"]
    if store.find(digest) is not None:
        return Response(status_code=200)
    claimed = request.headers.get("content-length", "")
    claimed_bytes = int(claimed) if claimed.isdigit() and len(claimed) < 16 else 1
    await store.take(digest, stream_body(request, MAX_BLOB_BYTES), claimed_bytes)
    return Response(status_code=201)


def files_of(server: Server, given: Mapping[str, Any]) -> dict[str, Path]:
    """The files of a model by the names that they get: its own, and its image encoder. BadRequest for others."""
    store, found = _store(server), dict[str, Path]()
    if len(given) > MAX_FILES:
        raise BadRequest(f"files: a model has at most {MAX_FILES}", param="files")
    for name, digest in given.items():
        path = store.find(digest) if isinstance(digest, str) else None
        if path is None:
            raise BadRequest(
                f"files: {name[:80]!r} is not here", remedy="Send it first: POST /api/blobs/DIGEST", param="files"
            )
        own = _kind(path, name)
        if own in found:
            raise BadRequest("files: one GGUF file is a model, and one its image encoder", param="files")
        found[own] = path
    if MODEL not in found:
        raise BadRequest("files: a model needs its GGUF file", param="files")
    return found


def check_template(source: str) -> None:
    """BadRequest for what is no Jinja, as Ollama's own templates are not."""
    try:
        ChatTemplate(source)
    except (PagodaError, jinja2.TemplateError) as error:
        raise BadRequest(
            f"template: it is not in Jinja: {error}",
            remedy="Leave template out to use the file's own, or give it in Jinja, as models on hubs have it",
            param="template",
        ) from None


def _kind(path: Path, name: str) -> str:
    try:
        source = open_source(str(path))
    except PagodaError as error:
        reason = error.message.replace(str(path), "it")  # where this server keeps its files is its own business
        raise BadRequest(f"files: {name[:80]!r}: {reason}", remedy="Send a whole GGUF file", param="files") from None
    metadata = source.metadata
    source.close()
    if not metadata:
        raise BadRequest(f"files: {name[:80]!r} is no GGUF file", param="files")
    return ENCODER if metadata.get("general.architecture") == "clip" else MODEL


def _store(server: Server) -> BlobStore:
    if server.blobs is None or server.hub is None:
        raise NotSupported(
            "this server takes no model files", remedy="Put the file on its machine and type pagoda serve FILE.gguf"
        )
    return server.blobs
