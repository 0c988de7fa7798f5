"""Ollama's /api/embed and /api/embeddings: texts to vectors."""

from __future__ import annotations

import time

from starlette.requests import Request
from starlette.responses import Response

from pagoda.api.http.body import parse, read_body
from pagoda.api.http.stream import Reply
from pagoda.api.ollama.options import resolve
from pagoda.api.ollama.protocol import OllamaEmbedBody, OllamaEmbeddingsBody, OllamaEmbeddingsReply, OllamaEmbedReply
from pagoda.api.pooling.prompts import input_prompts
from pagoda.api.pooling.replies import reply_to
from pagoda.api.serving.server import Server
from pagoda.engine.vectors import check_dimensions, vector
from pagoda.text.tokenizer import Cut


async def embed(server: Server, request: Request) -> Reply:
    body, ignored = parse(await read_body(request), OllamaEmbedBody)
    resolve(server, body.model)
    check_dimensions(body.dimensions, server.engine.info.width, server.sentence.dimensions)
    cut = Cut(server.max_model_len) if body.truncate else None
    prompts = await input_prompts(server, body.input, cut, server.sentence.default_prompt) if body.input else []
    call = server.start_pooled("embd", prompts, model=body.model or server.names[0])

    async def reply() -> OllamaEmbedReply:
        vectors = [vector(raw, True, body.dimensions).tolist() for raw in await call.vectors()]
        total_ns = int((time.monotonic() - call.started) * 1e9)
        return OllamaEmbedReply(
            model=call.model, embeddings=vectors, total_duration=total_ns, prompt_eval_count=call.prompt_tokens
        )

    return await reply_to(server, request, call, reply(), [*ignored, *_options(body)])


async def embed_one(server: Server, request: Request) -> Reply:
    body, ignored = parse(await read_body(request), OllamaEmbeddingsBody)
    resolve(server, body.model)
    if not body.prompt:
        return Response(b'{"embedding":[]}', media_type="application/json")
    cut = Cut(server.max_model_len) if body.truncate else None
    prompts = await input_prompts(server, body.prompt, cut, server.sentence.default_prompt)
    call = server.start_pooled("embd", prompts, model=server.names[0])

    async def reply() -> OllamaEmbeddingsReply:
        (raw,) = await call.vectors()
        return OllamaEmbeddingsReply(embedding=vector(raw, server.sentence.normalize).tolist())

    return await reply_to(server, request, call, reply(), [*ignored, *_options(body)])


def _options(body: OllamaEmbedBody | OllamaEmbeddingsBody) -> list[str]:
    """Options that have a value: none of them changes a vector."""
    return [f"options.{name}" for name, value in (body.options or {}).items() if value is not None]
