"""A message of a chat, and the deltas that it is streamed in; every dialect is rendered from these."""

from __future__ import annotations

import json
from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType


class Function(msgspec.Struct, kw_only=True):
    name: str
    arguments: str


class Custom(msgspec.Struct, kw_only=True):
    name: str
    input: str


class ToolCall(msgspec.Struct, kw_only=True):
    """A call of a function, or of a custom tool."""

    id: str
    type: Literal["function", "custom"] = "function"
    function: Function | UnsetType = UNSET
    custom: Custom | UnsetType = UNSET

    @property
    def name(self) -> str:
        return self.function.name if self.function else self.custom.name if self.custom else ""

    @property
    def text(self) -> str:
        """The function's arguments, or the custom tool's input."""
        return self.function.arguments if self.function else self.custom.input if self.custom else ""


class ChatMessage(msgspec.Struct, kw_only=True):
    """`content` is null only beside tool calls; reasoning goes out under both names that clients read.

    What is always null is there for programs that read the fields of OpenAI's and vLLM's messages by their names.
    """

    role: str
    content: str | None
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | None = None
    tool_calls: list[ToolCall] | UnsetType = UNSET


class FunctionDelta(msgspec.Struct, kw_only=True):
    name: str | UnsetType = UNSET
    arguments: str


class CustomDelta(msgspec.Struct, kw_only=True):
    name: str | UnsetType = UNSET
    input: str


class ToolCallDelta(msgspec.Struct, kw_only=True):
    """The first of a call names it; later ones hold nothing but its index and more of its arguments or its input."""

    index: int
    id: str | UnsetType = UNSET
    type: Literal["function", "custom"] | UnsetType = UNSET
    function: FunctionDelta | UnsetType = UNSET
    custom: CustomDelta | UnsetType = UNSET

    @property
    def name(self) -> str:
        called = self.function or self.custom
        return called.name or "" if called else ""

    @property
    def text(self) -> str:
        return self.function.arguments if self.function else self.custom.input if self.custom else ""


class ChatDelta(msgspec.Struct, kw_only=True):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


def arguments_object(text: str) -> dict[str, Any]:
    """A call's arguments. What is no object is wrapped as Anthropic says how: the tool's own check then shows it."""
    try:
        parsed = json.loads(text or "{}")
    except (ValueError, RecursionError):
        parsed = None
    return parsed if isinstance(parsed, dict) else {"INVALID_JSON": text}
