"""The bodies and replies of embedding, reranking and scoring, in the shapes of OpenAI, Cohere, Jina and vLLM."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType


class PoolingFields(msgspec.Struct, kw_only=True):
    """What all of them share. `truncate_prompt_tokens` -1 cuts to what the model takes; without it nothing is cut.

    Cut is the end of a text; with `truncation_side` left, its beginning. Of a pair only the second text is cut.
    `use_activation` false gives the model's bare numbers: no vectors of length 1, no probabilities.
    """

    model: str | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: Literal["left", "right"] | None = None
    use_activation: bool | None = None
    user: str | None = None
    priority: int | None = None
    drop_params: bool = False


class EmbeddingBody(PoolingFields, kw_only=True):
    """POST /v1/embeddings. `prompt_name`: which of the model's own prompts goes before each text."""

    input: str | list[Any]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    normalize: bool | None = None
    prompt_name: str | None = None
    add_special_tokens: bool = True


class ClassifyBody(PoolingFields, kw_only=True):
    """POST /classify"""

    input: str | list[Any]
    add_special_tokens: bool = True


class PoolingBody(PoolingFields, kw_only=True):
    """POST /pooling. `task` says again what the model does: embed or classify."""

    input: str | list[Any]
    task: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    normalize: bool | None = None
    add_special_tokens: bool = True


class RerankBody(PoolingFields, kw_only=True):
    """POST /v1/rerank. `top_n` null or 0 means all. Booleans may be written as strings, as some clients do."""

    query: str
    documents: list[str | dict[str, Any]]
    top_n: int | None = None
    return_documents: bool | str = True
    max_tokens_per_doc: int | None = None
    instruction: str | None = None
    return_len: bool | str = False


class ScoreBody(PoolingFields, kw_only=True):
    """POST /v1/score: one text with each of several, or two lists pair by pair; under vLLM's names, old and new."""

    text_1: str | list[str] | None = None
    text_2: str | list[str] | None = None
    queries: str | list[str] | None = None
    documents: str | list[str] | None = None
    items: str | list[str] | None = None
    data_1: str | list[str] | None = None
    data_2: str | list[str] | None = None
    instruction: str | None = None


class PoolingUsage(msgspec.Struct, kw_only=True):
    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0


class Embedding(msgspec.Struct, kw_only=True):
    index: int
    object: Literal["embedding"] = "embedding"
    embedding: list[float] | str


class EmbeddingReply(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Embedding]
    usage: PoolingUsage


class Class(msgspec.Struct, kw_only=True):
    """The likeliest label of a text, and the probabilities of all."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class ClassifyReply(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Class]
    usage: PoolingUsage


class PooledData(msgspec.Struct, kw_only=True):
    index: int
    object: Literal["pooling"] = "pooling"
    data: list[float] | str


class PoolingReply(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[PooledData]
    usage: PoolingUsage


class RankedDocument(msgspec.Struct, kw_only=True):
    text: str


class Ranked(msgspec.Struct, kw_only=True):
    index: int
    relevance_score: float
    document: RankedDocument | str | UnsetType = UNSET


class BilledUnits(msgspec.Struct, kw_only=True):
    search_units: int = 1


class ApiVersion(msgspec.Struct, kw_only=True):
    version: str = "2"


class RerankMeta(msgspec.Struct, kw_only=True):
    """What Cohere's clients expect."""

    api_version: ApiVersion = msgspec.field(default_factory=ApiVersion)
    billed_units: BilledUnits = msgspec.field(default_factory=BilledUnits)


class RerankReply(msgspec.Struct, kw_only=True):
    id: str
    model: str
    results: list[Ranked]
    usage: PoolingUsage
    meta: RerankMeta


class Score(msgspec.Struct, kw_only=True):
    index: int
    object: Literal["score"] = "score"
    score: float


class ScoreReply(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Score]
    usage: PoolingUsage
