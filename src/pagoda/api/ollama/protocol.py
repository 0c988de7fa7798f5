"""Ollama's bodies and replies as typed structs; its streams are lines of JSON."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from pagoda.api.http.dialect import Dialect, event
from pagoda.api.http.errors import ErrorDetail
from pagoda.api.turn.logprobs import ChatLogprob


class OllamaCall(msgspec.Struct, kw_only=True):
    """What /api/chat and /api/generate share. `truncate` and `shift` are accepted, but nothing is ever cut."""

    model: str | None = None
    stream: bool = True
    format: str | dict[str, Any] | None = None
    options: dict[str, Any] | None = None
    keep_alive: Any = None
    think: bool | str | None = None
    truncate: bool = True
    shift: bool = True
    logprobs: bool = False
    top_logprobs: int | None = None


class OllamaChatBody(OllamaCall, kw_only=True):
    """POST /api/chat"""

    messages: list[dict[str, Any]] = []
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None


class OllamaGenerateBody(OllamaCall, kw_only=True):
    """POST /api/generate. An empty prompt asks whether the model is loaded."""

    prompt: str = ""
    suffix: str = ""
    system: str = ""
    template: str = ""
    context: list[int] | None = None
    raw: bool = False
    images: list[str] | None = None


class OllamaEmbedBody(msgspec.Struct, kw_only=True):
    """POST /api/embed. `truncate`: cut what is too long, as Ollama does unless it is told not to."""

    model: str | None = None
    input: str | list[str] = []
    truncate: bool = True
    dimensions: int | None = None
    options: dict[str, Any] | None = None
    keep_alive: Any = None


class OllamaEmbeddingsBody(msgspec.Struct, kw_only=True):
    """POST /api/embeddings, the older way: one text."""

    model: str | None = None
    prompt: str = ""
    truncate: bool = True
    options: dict[str, Any] | None = None
    keep_alive: Any = None


class OllamaEmbeddingsReply(msgspec.Struct, kw_only=True):
    embedding: list[float]


class OllamaEmbedReply(msgspec.Struct, kw_only=True):
    model: str
    embeddings: list[list[float]]
    total_duration: int
    load_duration: int = 0
    prompt_eval_count: int


class OllamaNameBody(msgspec.Struct, kw_only=True):
    """A model by its name, under either key that clients use."""

    model: str = ""
    name: str = ""
    stream: bool = True


class OllamaCreateBody(msgspec.Struct, kw_only=True):
    """POST /api/create"""

    model: str = ""
    name: str = ""
    stream: bool = True
    from_: str = msgspec.field(name="from", default="")
    files: dict[str, Any] | None = None
    adapters: dict[str, Any] | None = None
    quantize: str = ""
    template: str = ""
    license: str | list[str] | None = None
    system: str | None = None
    parameters: dict[str, Any] | None = None
    messages: list[dict[str, Any]] | None = None


class OllamaCopyBody(msgspec.Struct, kw_only=True):
    """POST /api/copy"""

    source: str
    destination: str


class OllamaError(msgspec.Struct, kw_only=True):
    error: str


class OllamaMetrics(msgspec.Struct, kw_only=True):
    """What the last line of an answer adds; durations in nanoseconds."""

    done_reason: str | UnsetType = UNSET
    total_duration: int | UnsetType = UNSET
    load_duration: int | UnsetType = UNSET
    prompt_eval_count: int | UnsetType = UNSET
    prompt_eval_duration: int | UnsetType = UNSET
    eval_count: int | UnsetType = UNSET
    eval_duration: int | UnsetType = UNSET
    logprobs: list[ChatLogprob] | UnsetType = UNSET


class OllamaFunction(msgspec.Struct, kw_only=True):
    index: int
    name: str
    arguments: dict[str, Any]


class OllamaToolCall(msgspec.Struct, kw_only=True):
    id: str
    function: OllamaFunction


class OllamaMessage(msgspec.Struct, kw_only=True):
    role: str = "assistant"
    content: str
    thinking: str | UnsetType = UNSET
    tool_calls: list[OllamaToolCall] | UnsetType = UNSET


class OllamaChatReply(OllamaMetrics, kw_only=True):
    model: str
    created_at: str
    message: OllamaMessage
    done: bool


class OllamaGenerateReply(OllamaMetrics, kw_only=True):
    model: str
    created_at: str
    response: str
    thinking: str | UnsetType = UNSET
    done: bool


class OllamaVersion(msgspec.Struct, kw_only=True):
    version: str


class OllamaDetails(msgspec.Struct, kw_only=True):
    parent_model: str = ""
    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str
    context_length: int


class OllamaModel(msgspec.Struct, kw_only=True):
    """One entry of /api/tags; of /api/ps with the last three fields."""

    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: OllamaDetails
    capabilities: list[str]
    expires_at: str | UnsetType = UNSET
    size_vram: int | UnsetType = UNSET
    context_length: int | UnsetType = UNSET


class OllamaModels(msgspec.Struct, kw_only=True):
    models: list[OllamaModel]


class OllamaShow(msgspec.Struct, kw_only=True):
    license: str = ""
    modelfile: str
    parameters: str
    template: str
    system: str | UnsetType = UNSET
    messages: list[dict[str, Any]] | UnsetType = UNSET
    details: OllamaDetails
    model_info: dict[str, Any]
    capabilities: list[str]
    modified_at: str


class OllamaStatus(msgspec.Struct, kw_only=True):
    """How far a pull is, in bytes; what has a digest is one bar on the screen."""

    status: str
    digest: str | UnsetType = UNSET
    total: int | UnsetType = UNSET
    completed: int | UnsetType = UNSET


def line(body: msgspec.Struct) -> bytes:
    """One line of a stream. Some clients split at Unicode's line ends too, which `event` escapes."""
    return event(body).removeprefix(b"data: ")[:-1]


def timestamp(seconds: float | None = None) -> str:
    """RFC 3339; now by default."""
    moment = datetime.now(UTC) if seconds is None else datetime.fromtimestamp(seconds, UTC)
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


def _error(detail: ErrorDetail) -> OllamaError:
    return OllamaError(error=detail.message)


OLLAMA = Dialect(OllamaError, _error, line, media_type="application/x-ndjson", heartbeat=b"")
