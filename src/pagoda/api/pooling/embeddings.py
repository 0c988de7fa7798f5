"""POST /v1/embeddings: texts or token ids to vectors."""

from __future__ import annotations

from starlette.requests import Request

from pagoda.api.http.body import parse, read_body
from pagoda.api.http.stream import Reply
from pagoda.api.pooling.prompts import as_base64, cut_of, first_of, input_prompts, usage
from pagoda.api.pooling.protocol import Embedding, EmbeddingBody, EmbeddingReply
from pagoda.api.pooling.replies import reply_to
from pagoda.api.serving.generation import Pooled
from pagoda.api.serving.server import Server
from pagoda.engine.vectors import check_dimensions, vector


async def embeddings(server: Server, request: Request) -> Reply:
    body, ignored = parse(await read_body(request), EmbeddingBody)
    model = server.served.resolve(body.model)
    check_dimensions(body.dimensions, server.engine.info.width, server.sentence.dimensions)
    cut, before = cut_of(server, body), server.sentence.prompt(body.prompt_name)
    prompts = await input_prompts(server, body.input, cut, before, body.add_special_tokens)
    call = server.start_pooled("embd", prompts, model=model, priority=body.priority or 0)
    return await reply_to(server, request, call, _reply(server, call, body), ignored)


async def _reply(server: Server, call: Pooled, body: EmbeddingBody) -> EmbeddingReply:
    normalize = first_of(body.normalize, body.use_activation, server.sentence.normalize)
    found = [vector(raw, normalize, body.dimensions) for raw in await call.vectors()]
    text = body.encoding_format == "base64"
    data = [
        Embedding(index=index, embedding=as_base64(values) if text else values.tolist())
        for index, values in enumerate(found)
    ]
    return EmbeddingReply(
        id=call.id, created=call.created, model=call.model, data=data, usage=usage(call.prompt_tokens)
    )
