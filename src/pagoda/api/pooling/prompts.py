"""From texts to the prompts of embedding and scoring models, and from what these give to vectors and scores."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from pagoda.api.pooling.protocol import PoolingUsage
from pagoda.api.serving.server import INLINE_CHARS, Server
from pagoda.errors import BadRequest
from pagoda.text.rerank import pair_tokens
from pagoda.types import Float32

T = TypeVar("T")
Prompt = tuple[list[int], int | None]
"""Token ids, and the place of the second text of a pair."""

MAX_CHARS_PER_TOKEN = 64
_OTHER_IDS = (
    "Token ids must be those of this model's own tokenizer; where a client counts with tiktoken, send texts "
    "(LangChain: OpenAIEmbeddings(check_embedding_ctx_length=False))"
)


def limit_of(server: Server, truncate: int | None) -> int | None:
    """How many tokens a prompt is cut to; None: it is not cut."""
    if truncate is None:
        return None
    if truncate != -1 and truncate < 1:
        raise BadRequest(
            "truncate_prompt_tokens must be -1 (what the model takes) or at least 1", param="truncate_prompt_tokens"
        )
    return server.max_model_len if truncate == -1 else min(truncate, server.max_model_len)


async def text_prompts(server: Server, texts: Sequence[str], most: int | None, special: bool = True) -> list[Prompt]:
    """One prompt for each text, cut to `most` tokens where that is given."""
    longest = server.max_model_len * MAX_CHARS_PER_TOKEN
    if most is None:
        for text in texts:
            await server.check_length(text)

    def encode() -> list[Prompt]:
        out: list[Prompt] = []
        for text in texts:
            ids = server.tokenizer.encode(text if most is None else text[:longest], add_special_tokens=False)
            out.append((server.tokenizer.framed(ids, most) if special else ids[:most], None))
        return out

    return await unhurried(texts, encode)


async def unhurried(texts: Iterable[str], work: Callable[[], T]) -> T:
    """The result of work on texts, done in a thread where there is much of it."""
    return work() if sum(map(len, texts)) < INLINE_CHARS else await asyncio.to_thread(work)


async def input_prompts(
    server: Server, given: str | list[Any], most: int | None, before: str = "", special: bool = True
) -> list[Prompt]:
    """The prompts of an `input`: a text, texts, token ids, or lists of token ids. `before` goes before each text."""
    one = isinstance(given, str) or (given and isinstance(given[0], int))
    inputs: list[Any] = [given] if one else list(given)
    if not inputs:
        raise BadRequest("input is empty: give at least one text", param="input")
    if all(isinstance(each, str) for each in inputs):
        return await text_prompts(server, [before + each for each in inputs], most, special)
    size = server.vocab_size
    for ids in inputs:
        if not isinstance(ids, list) or any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
            raise BadRequest("input must be a text, a list of texts, token ids, or lists of token ids", param="input")
        if any(not 0 <= i < size for i in ids):
            raise BadRequest(f"input holds a token id outside 0..{size - 1}", remedy=_OTHER_IDS, param="input")
    return [(ids[:most], None) for ids in inputs]


async def pair_prompts(
    server: Server, pairs: Sequence[tuple[str, str]], most: int | None, instruction: str | None = None
) -> list[Prompt]:
    """One prompt for each pair of texts, the second text cut where `most` says so."""
    longest = server.max_model_len * MAX_CHARS_PER_TOKEN
    if any(len(text) > longest for pair in pairs for text in pair) and most is None:
        raise BadRequest("a text is far longer than the context of this model", param="documents")

    def encode() -> list[Prompt]:
        architecture = server.engine.info.architecture
        return [
            pair_tokens(server.tokenizer, architecture, first, second[:longest], most, instruction)
            for first, second in pairs
        ]

    return await unhurried((text for pair in pairs for text in pair), encode)


def usage(tokens: int) -> PoolingUsage:
    return PoolingUsage(prompt_tokens=tokens, total_tokens=tokens)


def as_base64(values: Float32) -> str:
    return base64.b64encode(values.astype("<f4", copy=False).tobytes()).decode()
