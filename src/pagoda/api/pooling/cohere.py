"""POST /v2/embed: embeddings as Cohere's clients ask for them."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
import numpy as np
from msgspec import UNSET, UnsetType
from starlette.requests import Request

from pagoda.api.http.body import parse, read_body
from pagoda.api.http.stream import Reply
from pagoda.api.pooling.prompts import as_base64, cut_of, text_prompts
from pagoda.api.pooling.protocol import ApiVersion, PoolingFields
from pagoda.api.pooling.replies import reply_to
from pagoda.api.serving.generation import Pooled
from pagoda.api.serving.server import Server
from pagoda.engine.vectors import check_dimensions, vector
from pagoda.errors import BadRequest
from pagoda.types import Float32

_KINDS = Literal["float", "binary", "ubinary", "base64"]
_OWN_NAMES = {
    "search_query": ("query", "search_query"),
    "search_document": ("document", "passage", "search_document"),
}
_SIDES: dict[str, Literal["left", "right"]] = {"START": "left", "END": "right"}


class CohereEmbedBody(msgspec.Struct, kw_only=True):
    """Texts come as `texts`, or as `inputs` of parts; what is too long is cut, unless `truncate` is NONE."""

    model: str | None = None
    input_type: str | None = None
    texts: list[str] | None = None
    inputs: list[dict[str, Any]] | None = None
    images: list[str] | None = None
    output_dimension: int | None = None
    embedding_types: list[_KINDS] | None = None
    truncate: Literal["NONE", "START", "END"] = "END"
    max_tokens: int | None = None
    priority: int | None = None
    drop_params: bool = False


class CohereVectors(msgspec.Struct, kw_only=True):
    float_: list[list[float]] | UnsetType = msgspec.field(name="float", default=UNSET)
    binary: list[list[int]] | UnsetType = UNSET
    ubinary: list[list[int]] | UnsetType = UNSET
    base64: list[str] | UnsetType = UNSET


class CohereBilled(msgspec.Struct, kw_only=True):
    input_tokens: int


class CohereMeta(msgspec.Struct, kw_only=True):
    billed_units: CohereBilled
    api_version: ApiVersion = msgspec.field(default_factory=ApiVersion)


class CohereEmbedReply(msgspec.Struct, kw_only=True):
    id: str
    embeddings: CohereVectors
    texts: list[str]
    meta: CohereMeta
    response_type: str = "embeddings_by_type"


async def embed(server: Server, request: Request) -> Reply:
    body, ignored = parse(await read_body(request), CohereEmbedBody)
    model = server.served.resolve(body.model)
    width = server.engine.info.width
    check_dimensions(body.output_dimension, width, server.sentence.dimensions)
    kinds = body.embedding_types or ["float"]
    if (body.output_dimension or width) % 8 and not {"binary", "ubinary"}.isdisjoint(kinds):
        raise BadRequest("bits need dimensions that are a multiple of 8", param="embedding_types")
    texts = _texts(body)
    side = _SIDES.get(body.truncate)
    cut = cut_of(
        server,
        PoolingFields(truncate_prompt_tokens=None if side is None else body.max_tokens or -1, truncation_side=side),
    )
    before = _before(server, body.input_type)
    prompts = await text_prompts(server, [before + text for text in texts], cut)
    most = body.max_tokens
    if side is None and most is not None and any(len(ids) > most for ids, _ in prompts):
        raise BadRequest(
            f"a text holds more than max_tokens {most}", remedy='Send "truncate": "END" to cut it', param="max_tokens"
        )
    call = server.start_pooled("embd", prompts, model=model, priority=body.priority or 0)
    return await reply_to(server, request, call, _reply(server, call, body, texts), ignored)


async def _reply(server: Server, call: Pooled, body: CohereEmbedBody, texts: list[str]) -> CohereEmbedReply:
    found = [vector(raw, server.sentence.normalize, body.output_dimension) for raw in await call.vectors()]
    kinds = set(body.embedding_types or ["float"])
    vectors = CohereVectors(
        float_=[values.tolist() for values in found] if "float" in kinds else UNSET,
        binary=[_bits(values, signed=True) for values in found] if "binary" in kinds else UNSET,
        ubinary=[_bits(values, signed=False) for values in found] if "ubinary" in kinds else UNSET,
        base64=[as_base64(values) for values in found] if "base64" in kinds else UNSET,
    )
    billed = CohereBilled(input_tokens=call.prompt_tokens)
    return CohereEmbedReply(id=call.id, embeddings=vectors, texts=texts, meta=CohereMeta(billed_units=billed))


def _bits(values: Float32, *, signed: bool) -> list[int]:
    """A bit for each dimension, 1 where it is not negative, the first one highest in its byte."""
    packed = np.packbits(values >= 0).astype(np.int64)
    out: list[int] = (packed - 128 if signed else packed).tolist()
    return out


def _texts(body: CohereEmbedBody) -> list[str]:
    given = [each for each in (body.texts, body.inputs, body.images) if each is not None]
    if len(given) != 1 or not given[0]:
        raise BadRequest("exactly one of texts and inputs must be given, and hold something", param="texts")
    if body.images is not None:
        raise BadRequest("images: this model embeds texts", param="images")
    return body.texts if body.texts is not None else [_text(i, each) for i, each in enumerate(body.inputs or [])]


def _text(index: int, given: dict[str, Any]) -> str:
    content = given.get("content")
    parts = content if isinstance(content, list) and content else [None]
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise BadRequest(f"inputs[{index}].content must be parts of type text: this model embeds texts", param="inputs")
    return "\n".join(str(text) for text in texts)


def _before(server: Server, input_type: str | None) -> str:
    """The model's own prompt for this use of a text, if it has one."""
    names = _OWN_NAMES.get(input_type or "", (input_type or "",))
    own = next((name for name in names if name in server.sentence.prompts), None)
    return server.sentence.prompt(own)
