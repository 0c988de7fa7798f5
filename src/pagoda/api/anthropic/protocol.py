"""Anthropic's bodies, replies and named events as typed structs."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from pagoda.api.http.dialect import Dialect, named
from pagoda.api.http.errors import ErrorDetail


class CountBody(msgspec.Struct, kw_only=True):
    """POST /v1/messages/count_tokens"""

    messages: list[dict[str, Any]]
    model: str | None = None
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None


class MessagesBody(CountBody, kw_only=True):
    """POST /v1/messages. Without `max_tokens` an answer may fill the rest of the context."""

    max_tokens: int | None = None
    stop_sequences: list[str] | None = None
    stream: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    metadata: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None
    output_format: dict[str, Any] | None = None


class CountReply(msgspec.Struct, kw_only=True):
    input_tokens: int


class MessagesUsage(msgspec.Struct, kw_only=True):
    """The prompt is `input_tokens` and what the cache held, together."""

    input_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int
    output_tokens: int


class TextBlock(msgspec.Struct, tag="text", kw_only=True):
    text: str


class ThinkingBlock(msgspec.Struct, tag="thinking", kw_only=True):
    thinking: str
    signature: str = ""


class ToolUseBlock(msgspec.Struct, tag="tool_use", kw_only=True):
    id: str
    name: str
    input: dict[str, Any]


Block = TextBlock | ThinkingBlock | ToolUseBlock


class MessagesReply(msgspec.Struct, tag="message", kw_only=True):
    id: str
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[Block]
    stop_reason: str | None
    stop_sequence: str | None
    usage: MessagesUsage


class MessageStart(msgspec.Struct, tag="message_start", kw_only=True):
    message: MessagesReply


class BlockStart(msgspec.Struct, tag="content_block_start", kw_only=True):
    index: int
    content_block: Block


class TextDelta(msgspec.Struct, tag="text_delta", kw_only=True):
    text: str


class ThinkingDelta(msgspec.Struct, tag="thinking_delta", kw_only=True):
    thinking: str


class InputDelta(msgspec.Struct, tag="input_json_delta", kw_only=True):
    partial_json: str


class BlockDelta(msgspec.Struct, tag="content_block_delta", kw_only=True):
    index: int
    delta: TextDelta | ThinkingDelta | InputDelta


class BlockStop(msgspec.Struct, tag="content_block_stop", kw_only=True):
    index: int


class Ending(msgspec.Struct, kw_only=True):
    stop_reason: str
    stop_sequence: str | None


class MessageDelta(msgspec.Struct, tag="message_delta", kw_only=True):
    delta: Ending
    usage: MessagesUsage


class MessageStop(msgspec.Struct, tag="message_stop", kw_only=True):
    pass


class Ping(msgspec.Struct, tag="ping", kw_only=True):
    pass


class AnthropicErrorDetail(msgspec.Struct, kw_only=True):
    type: str
    message: str


class AnthropicError(msgspec.Struct, tag="error", kw_only=True):
    error: AnthropicErrorDetail


MessagesEvent = MessageStart | BlockStart | BlockDelta | BlockStop | MessageDelta | MessageStop | Ping | AnthropicError

_ERROR_TYPES = (
    ("request_too_large", "request_too_large"),
    ("AuthenticationError", "authentication_error"),
    ("PermissionDeniedError", "permission_error"),
    ("NotFoundError", "not_found_error"),
    ("BadRequestError", "invalid_request_error"),
    ("RateLimitError", "rate_limit_error"),
    ("ServiceUnavailableError", "overloaded_error"),
)


def _error(detail: ErrorDetail) -> AnthropicError:
    kind = next((theirs for ours, theirs in _ERROR_TYPES if ours in (detail.code, detail.type)), "api_error")
    message = detail.message
    if detail.code == "context_length_exceeded":  # agents look for these words, and then shorten the prompt
        message = f"prompt is too long: {message}"
    return AnthropicError(error=AnthropicErrorDetail(type=kind, message=message))


ANTHROPIC = Dialect(AnthropicError, _error, named, heartbeat=named(Ping()))
