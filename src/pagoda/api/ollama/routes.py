"""The routes of Ollama's API."""

from __future__ import annotations

from pagoda.api.ollama import blobs, create, embed, generate, models, pull
from pagoda.api.ollama.protocol import (
    OLLAMA,
    OllamaChatBody,
    OllamaChatReply,
    OllamaCopyBody,
    OllamaCreateBody,
    OllamaEmbedBody,
    OllamaEmbeddingsBody,
    OllamaEmbeddingsReply,
    OllamaEmbedReply,
    OllamaGenerateBody,
    OllamaGenerateReply,
    OllamaModels,
    OllamaNameBody,
    OllamaShow,
    OllamaStatus,
    OllamaVersion,
)
from pagoda.api.serving.endpoint import Endpoint
from pagoda.api.serving.tasks import EMBED, GENERATE


def endpoints() -> tuple[Endpoint, ...]:
    return (
        Endpoint(
            "/api/chat", ("POST",), generate.chat, "Ollama: answer messages",
            OllamaChatBody, OllamaChatReply, OllamaChatReply, dialect=OLLAMA, tasks=GENERATE,
        ),
        Endpoint(
            "/api/generate", ("POST",), generate.generate, "Ollama: answer a prompt",
            OllamaGenerateBody, OllamaGenerateReply, OllamaGenerateReply, dialect=OLLAMA, tasks=GENERATE,
        ),
        Endpoint(
            "/api/embed", ("POST",), embed.embed, "Ollama: texts to vectors",
            OllamaEmbedBody, OllamaEmbedReply, dialect=OLLAMA, tasks=EMBED,
        ),
        Endpoint(
            "/api/embeddings", ("POST",), embed.embed_one, "Ollama: one text to a vector, the older way",
            OllamaEmbeddingsBody, OllamaEmbeddingsReply, dialect=OLLAMA, tasks=EMBED,
        ),
        Endpoint("/api/tags", ("GET",), models.tags, "Ollama: what is served", reply=OllamaModels, dialect=OLLAMA),
        Endpoint("/api/ps", ("GET",), models.ps, "Ollama: what is loaded", reply=OllamaModels, dialect=OLLAMA),
        Endpoint(
            "/api/show", ("POST",), models.show, "Ollama: describe a served model",
            OllamaNameBody, OllamaShow, dialect=OLLAMA,
        ),
        Endpoint(
            "/api/pull", ("POST",), pull.pull, "Ollama: fetch a model to this machine",
            OllamaNameBody, OllamaStatus, OllamaStatus, dialect=OLLAMA,
        ),
        Endpoint(
            "/api/delete", ("DELETE",), pull.delete, "Ollama: remove a model from this machine",
            OllamaNameBody, media=("text/plain",), dialect=OLLAMA,
        ),
        Endpoint("/api/version", ("GET",), models.version, "Ollama: its version", reply=OllamaVersion, dialect=OLLAMA),
        Endpoint(
            "/api/create", ("POST",), create.create, "Ollama: a model of the served one, or of files",
            OllamaCreateBody, OllamaStatus, OllamaStatus, dialect=OLLAMA,
        ),
        Endpoint(
            "/api/copy", ("POST",), create.copy, "Ollama: another name for a model", OllamaCopyBody,
            media=("text/plain",), dialect=OLLAMA,
        ),
        Endpoint("/api/blobs/{digest}", ("HEAD",), blobs.has_blob, "Ollama: whether a file is here", dialect=OLLAMA),
        Endpoint("/api/blobs/{digest}", ("POST",), blobs.take_blob, "Ollama: a file for a model", dialect=OLLAMA),
        Endpoint("/api/push", ("POST",), create.push, "Ollama: not on this server", dialect=OLLAMA),
    )  # fmt: skip
