"""Log-probabilities of tokens in the shapes of chat, completions and prompt_logprobs."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec
from msgspec import UNSET, UnsetType

from pagoda.types import TokenLogprob

if TYPE_CHECKING:
    from pagoda.text.tokenizer import Tokenizer


class TopLogprob(msgspec.Struct, kw_only=True):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob, kw_only=True):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, kw_only=True):
    content: list[ChatLogprob]


class CompletionLogprobs(msgspec.Struct, kw_only=True):
    """Parallel lists, one entry per token; the first prompt token has no log-probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(msgspec.Struct, kw_only=True, omit_defaults=True):
    logprob: float
    decoded_token: str
    rank: int | UnsetType = UNSET


PromptLogprobs = list[dict[str, PromptLogprob] | None]

LOWEST = -9999.0
"""What a probability of zero is written as: JSON has no minus infinity."""


class TokenNames:
    """How tokens are written: as text, or as `token_id:N` where the client asked for that."""

    def __init__(self, tokenizer: Tokenizer, as_ids: bool = False) -> None:
        self._tokenizer = tokenizer
        self._as_ids = as_ids

    def bytes(self, token_id: int) -> bytes:
        return self._tokenizer.token_bytes(token_id)

    def text(self, token_id: int) -> str:
        if self._as_ids:
            return f"token_id:{token_id}"
        return self.bytes(token_id).decode("utf-8", "replace")

    def unique(self, token_id: int) -> str:
        """Like `text`, but parts of a character stay apart: they are keys in the completions dialect."""
        raw = self.bytes(token_id)
        try:
            return f"token_id:{token_id}" if self._as_ids else raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def chat_logprobs(names: TokenNames, entries: Sequence[TokenLogprob]) -> ChatLogprobs:
    def one(token_id: int, logprob: float) -> TopLogprob:
        return TopLogprob(token=names.text(token_id), logprob=max(logprob, LOWEST), bytes=list(names.bytes(token_id)))

    return ChatLogprobs(
        content=[
            ChatLogprob(
                token=names.text(entry.token_id),
                logprob=max(entry.logprob, LOWEST),
                bytes=list(names.bytes(entry.token_id)),
                top_logprobs=[one(*top) for top in entry.top],
            )
            for entry in entries
        ]
    )


class CompletionLogprobsBuilder:
    """Turns the tokens of one choice, as they come, into the parallel lists of the completions dialect."""

    def __init__(self, names: TokenNames) -> None:
        self._names = names
        self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def take(self, token_ids: Sequence[int], entries: Sequence[TokenLogprob | None]) -> CompletionLogprobs:
        """The lists for these tokens; `text_offset` goes on from the tokens taken before."""
        out = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for token_id, entry in zip(token_ids, entries, strict=True):
            out.tokens.append(self._names.unique(token_id))
            out.token_logprobs.append(None if entry is None else max(entry.logprob, LOWEST))
            out.top_logprobs.append(None if entry is None else self._top(entry))
            out.text_offset.append(self._offset)
            self._offset += len(self._decoder.decode(self._names.bytes(token_id)))
        return out

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        top = {self._names.unique(token_id): max(logprob, LOWEST) for token_id, logprob in entry.top}
        top.setdefault(self._names.unique(entry.token_id), max(entry.logprob, LOWEST))
        return top


def prompt_logprobs(names: TokenNames, entries: Sequence[TokenLogprob | None]) -> PromptLogprobs:
    """One table per prompt token, from token id to its log-probability and rank; None for the first."""

    def table(entry: TokenLogprob) -> dict[str, PromptLogprob]:
        ranks = {token_id: rank for rank, (token_id, _) in enumerate(entry.top, 1)}
        values = {**dict(entry.top), entry.token_id: entry.logprob}
        return {
            str(token_id): PromptLogprob(
                logprob=max(logprob, LOWEST),
                decoded_token=names.text(token_id),
                rank=ranks.get(token_id, UNSET),
            )
            for token_id, logprob in values.items()
        }

    return [None if entry is None else table(entry) for entry in entries]
