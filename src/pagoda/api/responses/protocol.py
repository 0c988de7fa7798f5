"""The bodies, items and events of /v1/responses as typed structs."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from pagoda.api.turn.bodies import StreamOptions
from pagoda.api.turn.logprobs import ChatLogprob

Status = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
ItemStatus = Literal["in_progress", "completed", "incomplete"]


class ResponsesBody(msgspec.Struct, kw_only=True):
    """POST /v1/responses. `input` is a text or a list of items."""

    model: str | None = None
    input: str | list[dict[str, Any]] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool = True
    background: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_output_tokens: int | None = None
    max_tool_calls: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    include: list[str] | None = None
    truncation: Literal["auto", "disabled"] = "disabled"
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    conversation: Any = None
    prompt: Any = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    logit_bias: dict[str, float] | None = None
    cache_salt: str | None = None
    priority: int | None = None
    deadline_s: float | None = None
    enable_thinking: bool | None = None
    thinking_token_budget: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class OutputText(msgspec.Struct, tag="output_text", kw_only=True):
    text: str
    annotations: list[Any] = []
    logprobs: list[ChatLogprob] | UnsetType = UNSET


class ReasoningText(msgspec.Struct, tag="reasoning_text", kw_only=True):
    text: str


class MessageItem(msgspec.Struct, tag="message", kw_only=True):
    id: str
    role: Literal["assistant"] = "assistant"
    status: ItemStatus
    content: list[OutputText]


class SummaryText(msgspec.Struct, tag="summary_text", kw_only=True):
    text: str


class ReasoningItem(msgspec.Struct, tag="reasoning", kw_only=True):
    """What the model thought is told whole: as content, or as a summary where one was asked for."""

    id: str
    summary: list[SummaryText] = []
    content: list[ReasoningText] = []
    encrypted_content: str | None = None
    status: ItemStatus


class CallItem(msgspec.Struct, tag="function_call", kw_only=True):
    id: str
    call_id: str
    name: str
    arguments: str
    namespace: str | UnsetType = UNSET
    status: ItemStatus


class CustomCallItem(msgspec.Struct, tag="custom_tool_call", kw_only=True):
    id: str
    call_id: str
    name: str
    input: str
    namespace: str | UnsetType = UNSET
    status: ItemStatus


Item = MessageItem | ReasoningItem | CallItem | CustomCallItem
ContentPart = OutputText | ReasoningText


class InputDetails(msgspec.Struct, kw_only=True):
    cached_tokens: int


class OutputDetails(msgspec.Struct, kw_only=True):
    reasoning_tokens: int


class ResponseUsage(msgspec.Struct, kw_only=True):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class ResponseError(msgspec.Struct, kw_only=True):
    code: str
    message: str


class IncompleteDetails(msgspec.Struct, kw_only=True):
    reason: Literal["max_output_tokens"] = "max_output_tokens"


class ResponseReply(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Status
    background: bool
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    model: str
    output: list[Item]
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: dict[str, Any]
    safety_identifier: str | None
    service_tier: str
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["auto", "disabled"]
    usage: ResponseUsage | None = None
    user: str | None


class ResponseDeleted(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["response.deleted"] = "response.deleted"
    deleted: bool = True


class InputItems(msgspec.Struct, kw_only=True):
    object: Literal["list"] = "list"
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


class StreamEvent(msgspec.Struct, kw_only=True):
    """One event of a stream; its type is its tag."""

    sequence_number: int = 0


class _OfResponse(StreamEvent, kw_only=True):
    response: ResponseReply


class Created(_OfResponse, tag="response.created", kw_only=True):
    pass


class InProgress(_OfResponse, tag="response.in_progress", kw_only=True):
    pass


class Completed(_OfResponse, tag="response.completed", kw_only=True):
    pass


class Incomplete(_OfResponse, tag="response.incomplete", kw_only=True):
    pass


class Failed(_OfResponse, tag="response.failed", kw_only=True):
    pass


class _OfOutput(StreamEvent, kw_only=True):
    output_index: int


class ItemAdded(_OfOutput, tag="response.output_item.added", kw_only=True):
    item: Item


class ItemDone(_OfOutput, tag="response.output_item.done", kw_only=True):
    item: Item


class _OfItem(_OfOutput, kw_only=True):
    item_id: str


class _OfPart(_OfItem, kw_only=True):
    content_index: int = 0


class PartAdded(_OfPart, tag="response.content_part.added", kw_only=True):
    part: ContentPart


class PartDone(_OfPart, tag="response.content_part.done", kw_only=True):
    part: ContentPart


class TextDelta(_OfPart, tag="response.output_text.delta", kw_only=True):
    delta: str
    logprobs: list[ChatLogprob]


class TextDone(_OfPart, tag="response.output_text.done", kw_only=True):
    text: str
    logprobs: list[ChatLogprob]


class ReasoningDelta(_OfPart, tag="response.reasoning_text.delta", kw_only=True):
    delta: str


class ReasoningDone(_OfPart, tag="response.reasoning_text.done", kw_only=True):
    text: str


class _OfSummary(_OfItem, kw_only=True):
    summary_index: int = 0


class SummaryAdded(_OfSummary, tag="response.reasoning_summary_part.added", kw_only=True):
    part: SummaryText


class SummaryDelta(_OfSummary, tag="response.reasoning_summary_text.delta", kw_only=True):
    delta: str


class SummaryTextDone(_OfSummary, tag="response.reasoning_summary_text.done", kw_only=True):
    text: str


class SummaryDone(_OfSummary, tag="response.reasoning_summary_part.done", kw_only=True):
    part: SummaryText


class CustomInputDelta(_OfItem, tag="response.custom_tool_call_input.delta", kw_only=True):
    delta: str


class CustomInputDone(_OfItem, tag="response.custom_tool_call_input.done", kw_only=True):
    input: str


class ArgumentsDelta(_OfItem, tag="response.function_call_arguments.delta", kw_only=True):
    delta: str


class ArgumentsDone(_OfItem, tag="response.function_call_arguments.done", kw_only=True):
    arguments: str
    name: str


ResponseEvent = (
    Created
    | InProgress
    | Completed
    | Incomplete
    | Failed
    | ItemAdded
    | ItemDone
    | PartAdded
    | PartDone
    | TextDelta
    | TextDone
    | ReasoningDelta
    | ReasoningDone
    | ArgumentsDelta
    | ArgumentsDone
    | CustomInputDelta
    | CustomInputDone
    | SummaryAdded
    | SummaryDelta
    | SummaryTextDone
    | SummaryDone
)
