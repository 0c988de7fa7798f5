"""POST /v1/rerank in the shapes of Cohere, Jina and vLLM, and POST /v1/score: how well texts go together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msgspec import UNSET
from starlette.requests import Request

from pagoda.api.http.body import parse, read_body
from pagoda.api.http.stream import Reply
from pagoda.api.pooling.prompts import (
    MAX_CHARS_PER_TOKEN,
    Prompt,
    cut_of,
    pair_prompts,
    text_prompts,
    unhurried,
    usage,
)
from pagoda.api.pooling.protocol import (
    Ranked,
    RankedDocument,
    RerankBody,
    RerankMeta,
    RerankReply,
    Score,
    ScoreBody,
    ScoreReply,
)
from pagoda.api.pooling.replies import reply_to
from pagoda.api.serving.generation import Pooled
from pagoda.api.serving.server import Server
from pagoda.engine.vectors import classes, vector
from pagoda.errors import BadRequest

_PLAIN_TEXTS = "/api/rerank"
"""The path whose client reads a document as a bare string."""


async def rerank(server: Server, request: Request) -> Reply:
    body, ignored = parse(await read_body(request), RerankBody)
    model = server.served.resolve(body.model)
    texts = [_text(document) for document in body.documents]
    if not texts:
        raise BadRequest("documents is empty: give at least one", param="documents")
    pairs = [(body.query, text) for text in await _cut(server, texts, body.max_tokens_per_doc)]
    asking = _Comparison(server, body)
    call = await asking.start("rerank", pairs, model, body.priority, roles=("query", "document"))
    plain = request.scope["path"].endswith(_PLAIN_TEXTS)

    async def reply() -> RerankReply:
        scores = await asking.scores(call)
        order = sorted(range(len(texts)), key=lambda index: (-scores[index], index))
        shown = {index: texts[index] if plain else RankedDocument(text=texts[index]) for index in order}
        wanted = _flag(body.return_documents)
        results = [
            Ranked(index=index, relevance_score=scores[index], document=shown[index] if wanted else UNSET)
            for index in order[: body.top_n if body.top_n and body.top_n > 0 else None]
        ]
        return RerankReply(
            id=call.id, model=call.model, results=results, usage=usage(call.prompt_tokens), meta=RerankMeta()
        )

    return await reply_to(server, request, call, reply(), ignored)


async def score(server: Server, request: Request) -> Reply:
    body, ignored = parse(await read_body(request), ScoreBody)
    model = server.served.resolve(body.model)
    asking = _Comparison(server, body)
    call = await asking.start("score", _pairs(body), model, body.priority)

    async def reply() -> ScoreReply:
        data = [Score(index=index, score=value) for index, value in enumerate(await asking.scores(call))]
        return ScoreReply(
            id=call.id, created=call.created, model=call.model, data=data, usage=usage(call.prompt_tokens)
        )

    return await reply_to(server, request, call, reply(), ignored)


class _Comparison:
    """Compares pairs: a scoring model reads both texts, of an embedding model the cosine of their vectors is taken."""

    def __init__(self, server: Server, body: RerankBody | ScoreBody) -> None:
        self._server = server
        self._cut = cut_of(server, body)
        self._instruction, self._activation = body.instruction, body.use_activation
        self._embeds = server.engine.info.task == "embed"
        self._places: list[tuple[int, int]] = []  # of each pair among the texts of an embedding model

    async def start(
        self, kind: str, pairs: Sequence[tuple[str, str]], model: str, priority: int | None, roles: Sequence[str] = ()
    ) -> Pooled:
        """`roles`: the prompts that an embedding model has for first and second texts."""
        if self._embeds:
            prompts = await self._texts(pairs, roles)
        else:
            self._check_labels()
            prompts = await pair_prompts(self._server, pairs, self._cut, self._instruction)
        return self._server.start_pooled(kind, prompts, model=model, priority=priority or 0)

    async def _texts(self, pairs: Sequence[tuple[str, str]], roles: Sequence[str]) -> list[Prompt]:
        """Each text once."""
        sentence = self._server.sentence
        before = [sentence.prompts.get(role, sentence.default_prompt) for role in roles] or [""] * 2
        places: dict[str, int] = {}
        for first, second in pairs:
            self._places.append(
                (
                    places.setdefault(before[0] + first, len(places)),
                    places.setdefault(before[1] + second, len(places)),
                )
            )
        return await text_prompts(self._server, list(places), self._cut)

    def _check_labels(self) -> None:
        width = self._server.engine.info.width
        if width != 1:
            raise BadRequest(f"this model sorts texts into {width} classes, and gives no single score", param="model")

    async def scores(self, call: Pooled) -> list[float]:
        raw = await call.vectors()
        if not self._embeds:
            return [classes(each, self._activation)[0] for each in raw]
        vectors = [vector(each, True) for each in raw]
        return [float(vectors[first] @ vectors[second]) for first, second in self._places]


def _text(document: str | dict[str, Any]) -> str:
    """A document: a text, or an object with its text."""
    if isinstance(document, str):
        return document
    text = document.get("text")
    if isinstance(text, str):
        return text
    raise BadRequest('documents must hold texts, or objects with a "text"', param="documents")


async def _cut(server: Server, texts: list[str], most: int | None) -> list[str]:
    """Documents cut to so many of their own tokens, as Cohere counts them."""
    if most is None:
        return texts
    if most < 1:
        raise BadRequest("max_tokens_per_doc must be at least 1", param="max_tokens_per_doc")
    longest = most * MAX_CHARS_PER_TOKEN
    return await unhurried(texts, lambda: [server.tokenizer.beginning(text[:longest], most) for text in texts])


def _flag(value: bool | str) -> bool:
    return value if isinstance(value, bool) else value.strip().lower() == "true"


def _pairs(body: ScoreBody) -> list[tuple[str, str]]:
    first = next((each for each in (body.text_1, body.queries, body.data_1) if each is not None), None)
    others_named = (body.text_2, body.documents, body.items, body.data_2)
    second = next((each for each in others_named if each is not None), None)
    if first is None or second is None:
        raise BadRequest("text_1 and text_2 are required", param="text_1" if first is None else "text_2")
    ones = [first] if isinstance(first, str) else first
    others = [second] if isinstance(second, str) else second
    if len(ones) == 1:
        ones = ones * len(others)
    if not ones or len(ones) != len(others):
        raise BadRequest(
            f"text_1 holds {len(ones)} texts and text_2 {len(others)}: give one and several, or as many of both",
            param="text_2",
        )
    return list(zip(ones, others, strict=True))
