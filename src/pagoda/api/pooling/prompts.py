"""From texts to the prompts of embedding and scoring models, and from what these give to vectors and scores."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Iterable, Sequence, Sized
from typing import Any, TypeVar

from pagoda.api.pooling.protocol import PoolingFields, PoolingUsage
from pagoda.api.serving.server import INLINE_CHARS, Server
from pagoda.errors import BadRequest
from pagoda.text.rerank import pair_tokens
from pagoda.text.tokenizer import Cut
from pagoda.types import Float32

T = TypeVar("T")
Prompt = tuple[list[int], int | None]
"""Token ids, and the place of the second text of a pair."""

MAX_CHARS_PER_TOKEN = 64
_OTHER_IDS = (
    "Token ids must be those of this model's own tokenizer; where a client counts with tiktoken, send texts "
    "(LangChain: OpenAIEmbeddings(check_embedding_ctx_length=False))"
)


def cut_of(server: Server, body: PoolingFields) -> Cut | None:
    """How prompts are cut; None: they are not."""
    keep = body.truncate_prompt_tokens
    if keep is None:
        return None
    if keep != -1 and keep < 1:
        raise BadRequest(
            "truncate_prompt_tokens must be -1 (what the model takes) or at least 1", param="truncate_prompt_tokens"
        )
    most = server.max_model_len
    return Cut(most if keep == -1 else min(keep, most), body.truncation_side or "right")


def _near(server: Server, text: str, cut: Cut | None) -> str:
    """The part of a text that is encoded: what is far from what a cut keeps is not looked at."""
    longest = server.max_model_len * MAX_CHARS_PER_TOKEN
    if cut is None:
        return text
    return text[-longest:] if cut.side == "left" else text[:longest]


async def text_prompts(server: Server, texts: Sequence[str], cut: Cut | None, special: bool = True) -> list[Prompt]:
    """One prompt for each text."""
    if cut is None:
        for text in texts:
            await server.check_length(text)

    def encode() -> list[Prompt]:
        out: list[Prompt] = []
        for text in texts:
            ids = server.tokenizer.encode(_near(server, text, cut), add_special_tokens=False)
            out.append((server.tokenizer.framed(ids, cut) if special else _kept(ids, cut), None))
        return out

    return await unhurried(texts, encode)


def _kept(ids: list[int], cut: Cut | None) -> list[int]:
    return ids if cut is None else cut.kept(ids)


async def unhurried(texts: Iterable[Sized], work: Callable[[], T]) -> T:
    """The result of work on texts or token ids, done in a thread where there is much of it."""
    return work() if sum(map(len, texts)) < INLINE_CHARS else await asyncio.to_thread(work)


async def input_prompts(
    server: Server, given: str | list[Any], cut: Cut | None, before: str = "", special: bool = True
) -> list[Prompt]:
    """The prompts of an `input`: a text, texts, token ids, or lists of token ids. `before` goes before each text."""
    one = isinstance(given, str) or (given and isinstance(given[0], int))
    inputs: list[Any] = [given] if one else list(given)
    if not inputs:
        raise BadRequest("input is empty: give at least one text", param="input")
    if all(isinstance(each, str) for each in inputs):
        return await text_prompts(server, [before + each for each in inputs], cut, special)
    size = server.vocab_size
    for ids in inputs:
        if not isinstance(ids, list) or any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
            raise BadRequest("input must be a text, a list of texts, token ids, or lists of token ids", param="input")
        if any(not 0 <= i < size for i in ids):
            raise BadRequest(f"input holds a token id outside 0..{size - 1}", remedy=_OTHER_IDS, param="input")
    return [(_kept(ids, cut), None) for ids in inputs]


async def pair_prompts(
    server: Server, pairs: Sequence[tuple[str, str]], cut: Cut | None, instruction: str | None = None
) -> list[Prompt]:
    """One prompt for each pair of texts, the second of which may be cut."""
    server.check_count(len(pairs))
    longest = server.max_model_len * MAX_CHARS_PER_TOKEN
    if any(len(text) > longest for pair in pairs for text in pair) and cut is None:
        raise BadRequest("a text is far longer than the context of this model", param="documents")

    def encode() -> list[Prompt]:
        architecture = server.engine.info.architecture
        return [
            pair_tokens(server.tokenizer, architecture, first, _near(server, second, cut), cut, instruction)
            for first, second in pairs
        ]

    return await unhurried((text for pair in pairs for text in pair), encode)


def usage(tokens: int) -> PoolingUsage:
    return PoolingUsage(prompt_tokens=tokens, total_tokens=tokens)


def as_base64(values: Float32) -> str:
    return base64.b64encode(values.astype("<f4", copy=False).tobytes()).decode()


def first_of(*switches: bool | None) -> bool:
    """The first that somebody set."""
    return next((each for each in switches if each is not None), False)
