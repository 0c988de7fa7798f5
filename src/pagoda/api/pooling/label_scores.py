"""POST /generative_scoring: how likely one of several tokens is to come next behind a query and each of its items."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain, repeat

import msgspec
from starlette.requests import Request

from pagoda.api.http.body import parse, read_body
from pagoda.api.http.stream import Reply, answer
from pagoda.api.pooling.prompts import unhurried
from pagoda.api.pooling.protocol import PoolingUsage, Score, ScoreReply
from pagoda.api.serving.generation import Generation
from pagoda.api.serving.server import Server, too_long
from pagoda.errors import BadRequest
from pagoda.types import SamplingParams


class LabelScoresBody(msgspec.Struct, kw_only=True):
    """The score is the probability of the first label: among the labels, or with `apply_softmax` false of all tokens.

    Texts and token ids may be mixed. `item_first` puts each item before the query.
    """

    query: str | list[int]
    items: list[str | list[int]]
    label_token_ids: list[int]
    model: str | None = None
    apply_softmax: bool = True
    item_first: bool = False
    add_special_tokens: bool = True
    cache_salt: str | None = None
    priority: int | None = None
    request_id: str | None = None
    drop_params: bool = False


async def label_scores(server: Server, request: Request) -> Reply:
    body, ignored = parse(await read_body(request), LabelScoresBody)
    labels = body.label_token_ids
    _check(body, server)
    call = server.start(
        "generative-scoring",
        await _prompts(server, body),
        SamplingParams(max_tokens=1, temperature=0.0, logprob_token_ids=tuple(dict.fromkeys(labels))),
        model=server.served.resolve(body.model),
        cache_salt=body.cache_salt or "",
        priority=body.priority or 0,
        client_id=body.request_id,
    )
    reply = await answer(call, _scores(call, labels[0], body.apply_softmax), request.receive, server.aborted)
    server.dress(reply, ignored, call)
    return reply


def _check(body: LabelScoresBody, server: Server) -> None:
    labels, most = body.label_token_ids, server.options.max_logprobs
    server.check_count(len(body.items))
    if not 1 <= len(labels) <= most:
        raise BadRequest(f"label_token_ids must hold 1 to {most} token ids", param="label_token_ids")
    for name, ids in (
        ("label_token_ids", labels),
        ("query", body.query),
        *(("items", item) for item in body.items),
    ):
        if not isinstance(ids, str) and not all(0 <= token < server.vocab_size for token in ids):
            raise BadRequest(f"{name} holds a token id outside 0..{server.vocab_size - 1}", param=name)
    if not body.items:
        raise BadRequest("items is empty: give at least one", param="items")


async def _prompts(server: Server, body: LabelScoresBody) -> list[list[int]]:
    """Special tokens go around what comes first only."""
    texts = [text for text in (body.query, *body.items) if isinstance(text, str)]
    for text in texts:
        await server.check_length(text)

    def encode(text: str | list[int], first: bool) -> list[int]:
        special = first and body.add_special_tokens
        return server.tokenizer.encode(text, add_special_tokens=special) if isinstance(text, str) else text

    def prompts() -> list[list[int]]:
        query = encode(body.query, not body.item_first)
        items = [encode(item, body.item_first) for item in body.items]
        # Before they are joined: the query is copied for each item.
        longest = len(query) + max(map(len, items))
        if longest >= server.max_model_len:
            raise too_long(server.max_model_len, longest)
        return [[*item, *query] if body.item_first else [*query, *item] for item in items]

    return await unhurried(chain(repeat(body.query, len(body.items)), body.items), prompts)


async def _scores(call: Generation, label: int, among_labels: bool) -> ScoreReply:
    answers = await call.gather(lambda index, delta: None)
    scores = [_score(answer.logprobs[0].top, label, among_labels) for answer in answers]
    usage = call.usage()
    return ScoreReply(
        id=call.id,
        created=call.created,
        model=call.model,
        data=[Score(index=index, score=score) for index, score in enumerate(scores)],
        usage=PoolingUsage(
            prompt_tokens=usage.prompt_tokens,
            total_tokens=usage.total_tokens,
            completion_tokens=usage.completion_tokens,
        ),
    )


def _score(logprobs: Sequence[tuple[int, float]], label: int, among_labels: bool) -> float:
    told = dict(logprobs)
    if told[label] == -math.inf:
        return 0.0
    if not among_labels:
        return math.exp(told[label])
    return 1 / sum(math.exp(min(each - told[label], 700)) for each in told.values())
