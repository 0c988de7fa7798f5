"""The table of routes: what the router, the key check, the 404 texts and the documentation are made from."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from starlette.requests import Request

from pagoda.api import (
    anthropic,
    batches,
    chat,
    completions,
    docs,
    embeddings,
    files,
    models,
    ollama,
    ollama_models,
    rerank,
    responses,
    responses_stored,
    status,
    tokens,
)
from pagoda.api.anthropic_protocol import (
    ANTHROPIC,
    CountBody,
    CountReply,
    MessagesBody,
    MessagesEvent,
    MessagesReply,
)
from pagoda.api.endpoint import Endpoint
from pagoda.api.files_protocol import Batch, BatchBody, BatchList, FileDeleted, FileList, FileObject
from pagoda.api.ollama_protocol import (
    OLLAMA,
    OllamaChatBody,
    OllamaChatReply,
    OllamaGenerateBody,
    OllamaGenerateReply,
    OllamaModels,
    OllamaNameBody,
    OllamaShow,
    OllamaStatus,
    OllamaVersion,
)
from pagoda.api.pooling_protocol import (
    EmbeddingBody,
    EmbeddingReply,
    OllamaEmbedBody,
    OllamaEmbeddingsBody,
    OllamaEmbeddingsReply,
    OllamaEmbedReply,
    RerankBody,
    RerankReply,
    ScoreBody,
    ScoreReply,
)
from pagoda.api.protocol import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from pagoda.api.replies import (
    ChatChunk,
    ChatReply,
    CompletionReply,
    DetokenizeReply,
    ModelCard,
    ModelList,
    ServerInfo,
    ServerLoad,
    StatusReply,
    TokenizeReply,
    TokenizerInfo,
    VersionReply,
    Welcome,
)
from pagoda.api.responses_protocol import InputItems, ResponseDeleted, ResponseEvent, ResponseReply, ResponsesBody
from pagoda.api.server import Server
from pagoda.api.stream import Reply
from pagoda.api.tasks import COMPARE, EMBED, GENERATE

_QUERY: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "limit": {"type": "integer", "minimum": 1, "maximum": 100, "default": 20},
        "order": {"enum": ["asc", "desc"], "default": "desc"},
        "after": {"type": "string"},
        "purpose": {"type": "string"},
    }
)
_UPLOAD: Mapping[str, Any] = MappingProxyType(
    {
        "type": "object",
        "required": ["file", "purpose"],
        "properties": {
            "file": {"type": "string", "format": "binary"},
            "purpose": {"enum": list(files.PURPOSES)},
        },
    }
)


def _query(*names: str) -> Mapping[str, Mapping[str, Any]]:
    return {name: _QUERY[name] for name in names}


def endpoints() -> tuple[Endpoint, ...]:
    """Every route of the server. What is not here does not exist."""
    return (
        Endpoint(
            "/chat/completions", ("POST",), chat.chat_completions, "Answer messages, whole or streamed",
            ChatBody, ChatReply, ChatChunk, openai=True, tasks=GENERATE,
        ),
        Endpoint(
            "/completions", ("POST",), completions.completions, "Go on with a text or with token ids",
            CompletionBody, CompletionReply, CompletionReply, openai=True, tasks=GENERATE,
        ),
        *_responses(),
        *_pooled(),
        *_files(),
        *_anthropic(),
        *_ollama(),
        Endpoint("/models", ("GET",), models.list_models, "List what is served", reply=ModelList, openai=True),
        Endpoint(
            "/models/{model:path}", ("GET",), models.get_model, "Describe one served model",
            reply=ModelCard, openai=True,
        ),
        Endpoint("/tokenize", ("POST",), tokens.tokenize, "Text or messages to token ids", TokenizeBody, TokenizeReply),
        Endpoint("/detokenize", ("POST",), tokens.detokenize, "Token ids to text", DetokenizeBody, DetokenizeReply),
        Endpoint("/tokenizer_info", ("GET",), tokens.tokenizer_info, "Special tokens", reply=TokenizerInfo),
        Endpoint("/health", ("GET",), status.health, "200 when ready", reply=StatusReply, public=True),
        Endpoint("/ping", ("GET", "POST"), status.health, "The same as /health", reply=StatusReply, public=True),
        Endpoint("/version", ("GET",), status.version, "Pagoda's version", reply=VersionReply),
        Endpoint("/load", ("GET",), status.load, "Requests that are here now", reply=ServerLoad),
        Endpoint("/server_info", ("GET",), status.server_info, "Model, device, sizes", reply=ServerInfo),
        Endpoint("/metrics", ("GET",), status.metrics, "Prometheus metrics under vLLM's names", media=("text/plain",)),
        Endpoint(
            "/", ("GET",), ollama_models.root, "A page, JSON for programs",
            reply=Welcome, sign_in=True, media=("text/html", "text/plain"),
        ),
        Endpoint("/docs", ("GET",), docs_page, "This list", media=("text/html",)),
        Endpoint("/openapi.json", ("GET",), openapi_json, "The OpenAPI 3.1 description"),
    )  # fmt: skip


def _pooled() -> tuple[Endpoint, ...]:
    what = "Sort documents by how well they answer a query"
    return (
        Endpoint(
            "/embeddings", ("POST",), embeddings.embeddings, "Texts or token ids to vectors",
            EmbeddingBody, EmbeddingReply, openai=True, tasks=EMBED,
        ),
        Endpoint("/rerank", ("POST",), rerank.rerank, what, RerankBody, RerankReply, openai=True, tasks=COMPARE),
        Endpoint("/v2/rerank", ("POST",), rerank.rerank, what, RerankBody, RerankReply, tasks=COMPARE),
        Endpoint("/api/rerank", ("POST",), rerank.rerank, what, RerankBody, RerankReply, tasks=COMPARE),
        Endpoint(
            "/score", ("POST",), rerank.score, "How well pairs of texts go together",
            ScoreBody, ScoreReply, openai=True, tasks=COMPARE,
        ),
        Endpoint(
            "/api/embed", ("POST",), embeddings.embed, "Ollama: texts to vectors",
            OllamaEmbedBody, OllamaEmbedReply, dialect=OLLAMA, tasks=EMBED,
        ),
        Endpoint(
            "/api/embeddings", ("POST",), embeddings.embed_one, "Ollama: one text to a vector, the older way",
            OllamaEmbeddingsBody, OllamaEmbeddingsReply, dialect=OLLAMA, tasks=EMBED,
        ),
    )  # fmt: skip


def _responses() -> tuple[Endpoint, ...]:
    one = "/responses/{response_id}"
    told = responses_stored
    return (
        Endpoint(
            "/responses", ("POST",), responses.responses, "Answer items with items",
            ResponsesBody, ResponseReply, ResponseEvent, openai=True, tasks=GENERATE,
        ),
        Endpoint(one, ("GET",), told.get_response, "A stored response", reply=ResponseReply, openai=True),
        Endpoint(one, ("DELETE",), told.delete_response, "Forget a response", reply=ResponseDeleted, openai=True),
        Endpoint(
            one + "/cancel", ("POST",), told.cancel_response, "Stop a response in the background",
            reply=ResponseReply, openai=True,
        ),
        Endpoint(
            one + "/input_items", ("GET",), told.input_items, "What a response was made from",
            reply=InputItems, query=_query("limit", "order", "after"), openai=True,
        ),
    )  # fmt: skip


def _files() -> tuple[Endpoint, ...]:
    file, batch = "/files/{file_id}", "/batches/{batch_id}"
    return (
        Endpoint("/files", ("POST",), files.upload, "Upload a file", reply=FileObject, form=_UPLOAD, openai=True),
        Endpoint(
            "/files", ("GET",), files.list_files, "List the files",
            reply=FileList, query=_query("limit", "order", "after", "purpose"), openai=True,
        ),
        Endpoint(file, ("GET",), files.get_file, "Describe a file", reply=FileObject, openai=True),
        Endpoint(file, ("DELETE",), files.delete_file, "Delete a file", reply=FileDeleted, openai=True),
        Endpoint(
            file + "/content", ("GET",), files.file_content, "Read a file",
            media=("application/octet-stream",), openai=True,
        ),
        Endpoint(
            "/batches", ("POST",), batches.create_batch, "Answer the requests in a file, in its own time",
            BatchBody, Batch, openai=True,
        ),
        Endpoint(
            "/batches", ("GET",), batches.list_batches, "List the batches",
            reply=BatchList, query=_query("limit", "after"), openai=True,
        ),
        Endpoint(batch, ("GET",), batches.get_batch, "How far a batch is", reply=Batch, openai=True),
        Endpoint(batch + "/cancel", ("POST",), batches.cancel_batch, "Stop a batch", reply=Batch, openai=True),
    )  # fmt: skip


def _anthropic() -> tuple[Endpoint, ...]:
    return (
        Endpoint(
            "/messages", ("POST",), anthropic.messages, "Anthropic: answer messages, whole or streamed",
            MessagesBody, MessagesReply, MessagesEvent, openai=True, dialect=ANTHROPIC, tasks=GENERATE,
        ),
        Endpoint(
            "/messages/count_tokens", ("POST",), anthropic.count_tokens, "Anthropic: count a prompt's tokens",
            CountBody, CountReply, openai=True, dialect=ANTHROPIC, tasks=GENERATE,
        ),
    )  # fmt: skip


def _ollama() -> tuple[Endpoint, ...]:
    told = ollama_models
    not_here = (("create", "POST"), ("copy", "POST"), ("push", "POST"), ("delete", "DELETE"))
    return (
        Endpoint(
            "/api/chat", ("POST",), ollama.chat, "Ollama: answer messages",
            OllamaChatBody, OllamaChatReply, OllamaChatReply, dialect=OLLAMA, tasks=GENERATE,
        ),
        Endpoint(
            "/api/generate", ("POST",), ollama.generate, "Ollama: answer a prompt",
            OllamaGenerateBody, OllamaGenerateReply, OllamaGenerateReply, dialect=OLLAMA, tasks=GENERATE,
        ),
        Endpoint("/api/tags", ("GET",), told.tags, "Ollama: what is served", reply=OllamaModels, dialect=OLLAMA),
        Endpoint("/api/ps", ("GET",), told.ps, "Ollama: what is loaded", reply=OllamaModels, dialect=OLLAMA),
        Endpoint(
            "/api/show", ("POST",), told.show, "Ollama: describe a served model",
            OllamaNameBody, OllamaShow, dialect=OLLAMA,
        ),
        Endpoint(
            "/api/pull", ("POST",), told.pull, "Ollama: success for what is served",
            OllamaNameBody, OllamaStatus, OllamaStatus, dialect=OLLAMA,
        ),
        Endpoint("/api/version", ("GET",), told.version, "Ollama: its version", reply=OllamaVersion, dialect=OLLAMA),
        *(
            Endpoint(f"/api/{name}", (method,), told.manage, "Ollama: not on this server", dialect=OLLAMA)
            for name, method in not_here
        ),
    )  # fmt: skip


async def docs_page(server: Server, request: Request) -> Reply:
    return status.page_response(docs.page(docs.openapi(endpoints(), server.version)))


async def openapi_json(server: Server, request: Request) -> Reply:
    return docs.openapi_response(docs.openapi(endpoints(), server.version))
