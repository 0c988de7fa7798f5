"""POST /v1/embeddings, and Ollama's /api/embed and /api/embeddings: texts or token ids to vectors."""

from __future__ import annotations

import time

from starlette.requests import Request
from starlette.responses import Response

from pagoda.api.body import parse, read_body
from pagoda.api.generation import Pooled
from pagoda.api.ollama_options import resolve
from pagoda.api.pooling import as_base64, check_dimensions, input_prompts, limit_of, usage, vector
from pagoda.api.pooling_protocol import (
    Embedding,
    EmbeddingBody,
    EmbeddingReply,
    OllamaEmbedBody,
    OllamaEmbeddingsBody,
    OllamaEmbeddingsReply,
    OllamaEmbedReply,
)
from pagoda.api.server import Server
from pagoda.api.stream import Reply, answer
from pagoda.errors import BadRequest


async def embeddings(server: Server, request: Request) -> Reply:
    body, ignored = parse(await read_body(request), EmbeddingBody)
    model = server.served.resolve(body.model)
    check_dimensions(server, body.dimensions)
    most, before = limit_of(server, body.truncate_prompt_tokens), _prompt(server, body.prompt_name)
    prompts = await input_prompts(server, body.input, most, before, body.add_special_tokens)
    call = server.start_pooled("embd", prompts, model=model, priority=body.priority or 0)
    reply = await answer(call, _reply(server, call, body), request.receive, server.aborted)
    server.dress(reply, ignored, call)
    return reply


def _prompt(server: Server, name: str | None) -> str:
    """What goes before each text."""
    if name is None:
        return server.sentence.default_prompt
    prompts = server.sentence.prompts
    if name not in prompts:
        raise BadRequest(
            f"prompt_name {name[:100]!r} is no prompt of this model",
            remedy=f"It has: {', '.join(prompts) or 'none'}",
            param="prompt_name",
        )
    return prompts[name]


async def _reply(server: Server, call: Pooled, body: EmbeddingBody) -> EmbeddingReply:
    normalize = server.sentence.normalize if body.normalize is None else body.normalize
    found = [vector(raw, normalize, body.dimensions) for raw in await call.vectors()]
    text = body.encoding_format == "base64"
    data = [
        Embedding(index=index, embedding=as_base64(values) if text else values.tolist())
        for index, values in enumerate(found)
    ]
    return EmbeddingReply(
        id=call.id, created=call.created, model=call.model, data=data, usage=usage(call.prompt_tokens)
    )


async def embed(server: Server, request: Request) -> Reply:
    body, ignored = parse(await read_body(request), OllamaEmbedBody)
    resolve(server, body.model)
    check_dimensions(server, body.dimensions)
    most = server.max_model_len if body.truncate else None
    prompts = await input_prompts(server, body.input, most, server.sentence.default_prompt) if body.input else []
    call = server.start_pooled("embd", prompts, model=body.model or server.names[0])

    async def reply() -> OllamaEmbedReply:
        vectors = [vector(raw, True, body.dimensions).tolist() for raw in await call.vectors()]
        total_ns = int((time.monotonic() - call.started) * 1e9)
        return OllamaEmbedReply(
            model=call.model, embeddings=vectors, total_duration=total_ns, prompt_eval_count=call.prompt_tokens
        )

    response = await answer(call, reply(), request.receive, server.aborted)
    server.dress(response, [*ignored, *_options(body)], call)
    return response


async def embed_one(server: Server, request: Request) -> Reply:
    body, ignored = parse(await read_body(request), OllamaEmbeddingsBody)
    resolve(server, body.model)
    if not body.prompt:
        return Response(b'{"embedding":[]}', media_type="application/json")
    most = server.max_model_len if body.truncate else None
    prompts = await input_prompts(server, body.prompt, most, server.sentence.default_prompt)
    call = server.start_pooled("embd", prompts, model=server.names[0])

    async def reply() -> OllamaEmbeddingsReply:
        (raw,) = await call.vectors()
        return OllamaEmbeddingsReply(embedding=vector(raw, server.sentence.normalize).tolist())

    response = await answer(call, reply(), request.receive, server.aborted)
    server.dress(response, [*ignored, *_options(body)], call)
    return response


def _options(body: OllamaEmbedBody | OllamaEmbeddingsBody) -> list[str]:
    """Options that have a value: none of them changes a vector."""
    return [f"options.{name}" for name, value in (body.options or {}).items() if value is not None]
