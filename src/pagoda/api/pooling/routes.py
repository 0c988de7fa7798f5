"""The routes of embeddings, reranking and scores, under the many paths that clients know."""

from __future__ import annotations

from pagoda.api.pooling import classify, cohere, embeddings, label_scores, rerank
from pagoda.api.pooling.cohere import CohereEmbedBody, CohereEmbedReply
from pagoda.api.pooling.label_scores import LabelScoresBody
from pagoda.api.pooling.protocol import (
    ClassifyBody,
    ClassifyReply,
    EmbeddingBody,
    EmbeddingReply,
    PoolingBody,
    PoolingReply,
    RerankBody,
    RerankReply,
    ScoreBody,
    ScoreReply,
)
from pagoda.api.serving.endpoint import Endpoint
from pagoda.api.serving.tasks import COMPARE, EMBED, GENERATE, SCORE


def endpoints() -> tuple[Endpoint, ...]:
    what = "Sort documents by how well they answer a query"
    return (
        Endpoint(
            "/embeddings", ("POST",), embeddings.embeddings, "Texts or token ids to vectors",
            EmbeddingBody, EmbeddingReply, openai=True, tasks=EMBED,
        ),
        Endpoint(
            "/v2/embed", ("POST",), cohere.embed, "Cohere: texts to vectors",
            CohereEmbedBody, CohereEmbedReply, tasks=EMBED,
        ),
        Endpoint(
            "/classify", ("POST",), classify.classify, "Texts to classes",
            ClassifyBody, ClassifyReply, openai=True, tasks=SCORE,
        ),
        Endpoint(
            "/pooling", ("POST",), classify.pooling, "Texts to what the model gives: vectors or probabilities",
            PoolingBody, PoolingReply, openai=True, tasks=COMPARE,
        ),
        Endpoint("/rerank", ("POST",), rerank.rerank, what, RerankBody, RerankReply, openai=True, tasks=COMPARE),
        Endpoint("/v2/rerank", ("POST",), rerank.rerank, what, RerankBody, RerankReply, tasks=COMPARE),
        Endpoint("/api/rerank", ("POST",), rerank.rerank, what, RerankBody, RerankReply, tasks=COMPARE),
        Endpoint(
            "/score", ("POST",), rerank.score, "How well pairs of texts go together",
            ScoreBody, ScoreReply, openai=True, tasks=COMPARE,
        ),
        Endpoint(
            "/generative_scoring", ("POST",), label_scores.label_scores, "How likely a token is behind query and item",
            LabelScoresBody, ScoreReply, tasks=GENERATE,
        ),
    )  # fmt: skip
