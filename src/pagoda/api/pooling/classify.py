"""POST /classify and POST /pooling in the shapes of vLLM: texts to classes, and texts to whatever the model gives."""

from __future__ import annotations

import numpy as np
from starlette.requests import Request

from pagoda.api.http.body import parse, read_body
from pagoda.api.http.stream import Reply
from pagoda.api.pooling.prompts import as_base64, cut_of, first_of, input_prompts, usage
from pagoda.api.pooling.protocol import Class, ClassifyBody, ClassifyReply, PooledData, PoolingBody, PoolingReply
from pagoda.api.pooling.replies import reply_to
from pagoda.api.serving.server import Server
from pagoda.engine.vectors import check_dimensions, classes, vector
from pagoda.errors import BadRequest
from pagoda.types import Float32


async def classify(server: Server, request: Request) -> Reply:
    body, ignored = parse(await read_body(request), ClassifyBody)
    model = server.served.resolve(body.model)
    cut = cut_of(server, body)
    prompts = await input_prompts(server, body.input, cut, "", body.add_special_tokens)
    call = server.start_pooled("classify", prompts, model=model, priority=body.priority or 0)
    names = server.sentence.labels

    async def reply() -> ClassifyReply:
        data = []
        for index, raw in enumerate(await call.vectors()):
            probs = classes(raw, body.use_activation)
            best = probs.index(max(probs))
            label = names[best] if best < len(names) else f"LABEL_{best}"
            data.append(Class(index=index, label=label, probs=probs, num_classes=len(probs)))
        tokens = usage(call.prompt_tokens)
        return ClassifyReply(id=call.id, created=call.created, model=call.model, data=data, usage=tokens)

    return await reply_to(server, request, call, reply(), ignored)


async def pooling(server: Server, request: Request) -> Reply:
    body, ignored = parse(await read_body(request), PoolingBody)
    model = server.served.resolve(body.model)
    info, sentence = server.engine.info, server.sentence
    embeds = info.task == "embed"
    if body.task not in (None, "embed" if embeds else "classify"):
        raise BadRequest(
            f"task {str(body.task)[:32]!r}: this model can {'embed' if embeds else 'classify'}", param="task"
        )
    check_dimensions(body.dimensions, info.width, sentence.dimensions if embeds else None)
    cut, before = cut_of(server, body), sentence.default_prompt if embeds else ""
    prompts = await input_prompts(server, body.input, cut, before, body.add_special_tokens)
    call = server.start_pooled("pool", prompts, model=model, priority=body.priority or 0)
    normalize = first_of(body.normalize, body.use_activation, sentence.normalize)

    def values(raw: bytes) -> Float32:
        if embeds:
            return vector(raw, normalize, body.dimensions)
        return np.asarray(classes(raw, body.use_activation), np.float32)

    async def reply() -> PoolingReply:
        found = [values(raw) for raw in await call.vectors()]
        text = body.encoding_format == "base64"
        data = [
            PooledData(index=index, data=as_base64(each) if text else each.tolist()) for index, each in enumerate(found)
        ]
        tokens = usage(call.prompt_tokens)
        return PoolingReply(id=call.id, created=call.created, model=call.model, data=data, usage=tokens)

    return await reply_to(server, request, call, reply(), ignored)
