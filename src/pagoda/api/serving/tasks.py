"""Which kind of model a route is for: one that generates text, makes embeddings, or scores pairs of texts."""

from __future__ import annotations

from collections.abc import Sequence

from pagoda.api.serving.server import Server
from pagoda.errors import BadRequest

GENERATE = ("generate",)
EMBED = ("embed",)
SCORE = ("score",)
COMPARE = ("embed", "score")
ALL = ("generate", "embed", "score")

_DOES = {"generate": "generates text", "embed": "makes embeddings", "score": "scores or classifies texts"}
_CANNOT = {"generate": "generate text", "embed": "make embeddings", "score": "score or classify texts"}
_INSTEAD = {
    "generate": "POST /v1/chat/completions here; for the other start a server with such a model",
    "embed": "POST /v1/embeddings or /v1/rerank here; for the other start a server with such a model",
    "score": "POST /v1/rerank or /v1/score here; for the other start a server with such a model",
}


def check_task(server: Server, tasks: Sequence[str]) -> None:
    """Raise BadRequest where the served model is of another kind than the route is for."""
    if not tasks:
        return
    task = server.engine.info.task
    if task not in tasks:
        does, cannot = _DOES[task], _CANNOT[tasks[-1]]
        raise BadRequest(
            f"the model {server.names[0]} {does}, and cannot {cannot}", remedy=_INSTEAD[task], param="model"
        )
