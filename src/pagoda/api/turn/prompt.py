"""From the messages of a chat body to the token ids of its prompt."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pagoda.api.serving.server import INLINE_CHARS, Server
from pagoda.api.turn.bodies import ChatBody, TokenizeBody
from pagoda.api.turn.custom import function_call
from pagoda.errors import BadRequest
from pagoda.media.sources import has_media, take_sources
from pagoda.types import Image

MAX_MESSAGES = 10_000
_HIDDEN_PARTS = ("thinking", "reasoning", "redacted_thinking")
_SWITCHES = ("enable_thinking", "thinking")
"""What templates call the switch for thinking."""
_NO_EFFORT = ("none", "minimal")
_REASONING_NAMES = ("reasoning_content", "reasoning", "thinking", "reasoning_text")


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids, and the pictures that lie on some of them."""

    ids: list[int]
    images: list[Image] = field(default_factory=list)


async def chat_prompt(server: Server, body: ChatBody | TokenizeBody) -> Prompt:
    """Render the template and encode. Raises BadRequest for what the template or the model cannot take."""
    template = server.chat_template
    if template is None:
        raise BadRequest(
            f"{server.names[0]} has no chat template, so it cannot take messages",
            remedy="Use /v1/completions, or start the server with --chat-template FILE",
        )
    _check(body)
    given = server.derived.begin(server.served.resolve(body.model), body.messages or [])
    messages = [_as_templates_know_it(message) for message in given]
    texts = [text for message in messages for text in _texts(message.get("content"))]
    if getattr(body, "truncate_prompt_tokens", None) is None:
        await server.check_length(max(texts, key=len, default=""))

    messages, images = await _take_pictures(server, messages, body.mm_processor_kwargs or {})

    def encode() -> list[int]:
        return template.encode(
            server.tokenizer,
            messages,
            tools=body.tools if getattr(body, "tool_choice", None) != "none" else None,
            add_generation_prompt=body.add_generation_prompt and not body.continue_final_message,
            continue_final_message=body.continue_final_message,
            template_kwargs=all_kwargs(server, body),
        )

    ids = encode() if sum(map(len, texts)) < INLINE_CHARS else await asyncio.to_thread(encode)
    if server.pictures is None or not images:
        return Prompt(ids)
    ids, images = server.pictures.seeing.place(ids, images, partial(server.tokenizer.encode, add_special_tokens=False))
    server.pictures.seeing.check_length(ids, images, server.max_model_len)
    return Prompt(ids, images)


async def _take_pictures(
    server: Server, messages: Sequence[Mapping[str, Any]], asked: Mapping[str, Any]
) -> tuple[list[Any], list[Image]]:
    """The messages with bare parts where pictures were, and these, ready for the model."""
    if not has_media(messages):
        return list(messages), []
    if server.pictures is None:
        raise BadRequest(
            f"the messages hold a picture, but this model takes text only: {server.names[0]} does not see",
            remedy="Start a server with a model that sees, such as Qwen2.5-VL",
            param="messages",
        )
    bare, sources = take_sources(messages)
    return bare, await server.pictures.read(sources, asked, server.max_model_len)


def _check(body: ChatBody | TokenizeBody) -> None:
    if len(body.messages or ()) > MAX_MESSAGES:
        raise BadRequest(f"messages takes at most {MAX_MESSAGES} messages", param="messages")
    if body.chat_template is not None:
        raise BadRequest(
            "chat_template: a template may not come with a request",
            remedy="Start the server with --chat-template FILE",
            param="chat_template",
        )
    if not isinstance(body, ChatBody):
        return
    if body.functions:
        raise BadRequest("functions is no longer supported: use tools", param="functions")
    if body.modalities and any(kind != "text" for kind in body.modalities):
        raise BadRequest("modalities: this model gives text only", param="modalities")


def _as_templates_know_it(given: dict[str, Any]) -> dict[str, Any]:
    """The message with earlier reasoning under the one name that templates use, and calls of functions only."""
    message = {name: value for name, value in given.items() if name not in _REASONING_NAMES}
    reasoning = next((given[name] for name in _REASONING_NAMES if isinstance(given.get(name), str)), None)
    if reasoning is not None:
        message["reasoning_content"] = reasoning
    if isinstance(calls := message.get("tool_calls"), list):
        message["tool_calls"] = [function_call(call) for call in calls]
    content = message.get("content")
    if isinstance(content, list):
        message["content"] = [part for part in content if not _is_hidden(part)]
    return message


def _is_hidden(part: object) -> bool:
    return isinstance(part, dict) and part.get("type") in _HIDDEN_PARTS


def _texts(content: object) -> list[str]:
    """The texts of a message's content, of whatever form it may be: it is checked later."""
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    return [text for text in texts if isinstance(text, str)]


def all_kwargs(server: Server, body: ChatBody | TokenizeBody) -> dict[str, Any]:
    """The template's variables, the request's before the server's."""
    return {**server.default_template_kwargs, **template_kwargs(body)}


def template_kwargs(body: ChatBody | TokenizeBody) -> dict[str, Any]:
    """The template's variables: as given, and the switches for thinking under all the names that clients use."""
    given = dict(body.chat_template_kwargs or {})
    switches: list[bool | None] = [given.get(name) for name in _SWITCHES if isinstance(given.get(name), bool)]
    if isinstance(body, ChatBody):
        effort = body.reasoning_effort or (body.reasoning or {}).get("effort")
        kind = (body.thinking or {}).get("type")
        switches += [
            body.enable_thinking,
            None if kind is None else kind != "disabled",
            None if body.think is None else body.think not in (False, "none"),
            None if effort is None else effort not in _NO_EFFORT,
        ]
        if isinstance(effort, str):
            given.setdefault("reasoning_effort", effort)
        if body.documents:
            given.setdefault("documents", body.documents)
        switches.append(False if thinking_budget(body) == 0 else None)
    switch = next((value for value in switches if value is not None), None)
    if switch is not None:
        for name in _SWITCHES:
            given.setdefault(name, switch)
    return given


def thinking_budget(body: ChatBody) -> int | None:
    """How many tokens the reasoning may take, under any of the names that clients use; 0: no reasoning."""
    given = (
        ("thinking_token_budget", body.thinking_token_budget),
        ("thinking_budget", body.thinking_budget),
        ("thinking", (body.thinking or {}).get("budget_tokens")),
        ("reasoning", (body.reasoning or {}).get("max_tokens")),
    )
    name, budget = next((each for each in given if each[1] is not None), ("", None))
    if budget is None:
        return None
    if not isinstance(budget, int) or isinstance(budget, bool) or not -1 <= budget < 2**31:
        raise BadRequest(f"{name}: the budget must be a number of tokens, or -1 for no limit", param=name)
    return None if budget == -1 else budget
