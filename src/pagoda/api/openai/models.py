"""GET /v1/models and /v1/models/{id}: what is served, in the shape that vLLM gives."""

from __future__ import annotations

import hashlib

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from pagoda.api.http.errors import JSON, to_json
from pagoda.api.openai.replies import Modalities, ModelCard, ModelList, Permission
from pagoda.api.serving.server import Server

_SEES = Modalities(input_modalities=["text", "image"], output_modalities=["text"])


async def list_models(server: Server, request: Request) -> Response:
    cards = [_card(server, name) for name in server.served.names]
    return Response(to_json(ModelList(data=cards)), media_type=JSON)


async def get_model(server: Server, request: Request) -> Response:
    name = server.served.resolve(request.path_params["model"])
    return Response(to_json(_card(server, name)), media_type=JSON)


def _card(server: Server, name: str) -> ModelCard:
    made, adapter = server.derived.get(name), server.adapters.get(name)
    parent = None if made is None else made.parent or None
    if adapter is not None:
        parent = server.adapters.parent(name) or server.names[0]
    # Derived, not drawn: two requests for the same list get the same bytes.
    digest = hashlib.sha256(f"{name}\0{server.created}".encode()).hexdigest()
    return ModelCard(
        id=name,
        created=server.created if made is None else int(made.created),
        root=server.root if adapter is None else adapter.path,
        parent=parent,
        max_model_len=server.max_model_len,
        permission=[Permission(id=f"modelperm-{digest[:32]}", created=server.created)],
        context_length=server.max_model_len,
        max_tokens=server.max_model_len,
        architecture=_SEES if server.pictures is not None else msgspec.UNSET,
    )
