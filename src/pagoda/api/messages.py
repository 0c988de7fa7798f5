"""From the messages of a chat body to the token ids of its prompt."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from pagoda.api.protocol import ChatBody, TokenizeBody
from pagoda.errors import BadRequest

if TYPE_CHECKING:
    from pagoda.api.server import Server
    from pagoda.text.chat import ChatTemplate

MAX_MESSAGES = 10_000
INLINE_CHARS = 20_000
_TEXT_PARTS = ("text", "input_text", "output_text")
_HIDDEN_PARTS = ("thinking", "reasoning", "redacted_thinking")
_REASONING_NAMES = ("reasoning_content", "reasoning", "thinking", "reasoning_text")
_OURS = ("messages", "tools", "tokenize", "chat_template", "add_generation_prompt", "continue_final_message")


async def chat_prompt(server: Server, body: ChatBody | TokenizeBody) -> list[int]:
    """Render the template and encode. Raises BadRequest for what the template or the model cannot take."""
    template = server.chat_template
    if template is None:
        raise BadRequest(
            f"{server.names[0]} has no chat template, so it cannot take messages",
            remedy="Use /v1/completions, or start the server with --chat-template FILE",
        )
    _check(body)
    messages = [_message(index, given) for index, given in enumerate(body.messages or [])]
    kwargs = {**server.default_template_kwargs, **template_kwargs(body)}
    await _check_length(server, messages)
    tools = body.tools or None if getattr(body, "tool_choice", None) != "none" else None
    if sum(_chars(message) for message in messages) < INLINE_CHARS:
        return _encode(server, template, body, messages, tools, kwargs)
    return await asyncio.to_thread(_encode, server, template, body, messages, tools, kwargs)


def _encode(
    server: Server,
    template: ChatTemplate,
    body: ChatBody | TokenizeBody,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    kwargs: Mapping[str, Any],
) -> list[int]:
    def render(these: list[dict[str, Any]]) -> list[int]:
        return template.encode(
            server.tokenizer,
            these,
            tools=tools,
            add_generation_prompt=body.add_generation_prompt and not body.continue_final_message,
            continue_final_message=body.continue_final_message,
            template_kwargs=dict(kwargs),
        )

    try:
        return render(messages)
    except BadRequest:
        # Some templates take a system message only at the beginning, while clients send several anywhere.
        merged = merge_system(messages)
        if merged == messages:
            raise
        return render(merged)


def merge_system(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """All system messages joined into one at the beginning."""
    system = [message["content"] for message in messages if message["role"] == "system"]
    others = [message for message in messages if message["role"] != "system"]
    return [{"role": "system", "content": "\n\n".join(system)}, *others] if system else others


def _check(body: ChatBody | TokenizeBody) -> None:
    if not body.messages:
        raise BadRequest("messages must hold at least one message", param="messages")
    if len(body.messages) > MAX_MESSAGES:
        raise BadRequest(f"messages takes at most {MAX_MESSAGES} messages", param="messages")
    if body.chat_template is not None:
        raise BadRequest(
            "chat_template: a template may not come with a request",
            remedy="Start the server with --chat-template FILE",
            param="chat_template",
        )
    if body.continue_final_message and body.messages[-1].get("role") != "assistant":
        raise BadRequest("continue_final_message needs an assistant message at the end", param="continue_final_message")
    if not isinstance(body, ChatBody):
        return
    if body.functions:
        raise BadRequest("functions is no longer supported: use tools", param="functions")
    if body.modalities and any(kind != "text" for kind in body.modalities):
        raise BadRequest("modalities: this model gives text only", param="modalities")
    if body.tool_choice not in (None, "none", "auto"):
        raise BadRequest("tool_choice may be auto or none; to require a tool is not yet supported", param="tool_choice")


def _message(index: int, given: dict[str, Any]) -> dict[str, Any]:
    """One message as templates expect it: text content, `system` for developer, tool arguments as objects."""
    role = given.get("role")
    if not isinstance(role, str) or not role:
        raise BadRequest(f"messages[{index}].role must be a string such as user", param="messages")
    message = {name: value for name, value in given.items() if value is not None and name not in _REASONING_NAMES}
    message["role"] = "system" if role == "developer" else role
    message["content"] = _content(f"messages[{index}].content", given.get("content"))
    for name in _REASONING_NAMES:
        if isinstance(given.get(name), str):
            message["reasoning_content"] = given[name]
            break
    if "tool_calls" in message:
        message["tool_calls"] = _tool_calls(f"messages[{index}].tool_calls", message["tool_calls"])
        if not message["tool_calls"]:
            del message["tool_calls"]
    return message


def _content(where: str, content: object) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRequest(f"{where} must be a string or a list of parts", param="messages")
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type", "text") if isinstance(part, dict) else None
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and kind in _TEXT_PARTS and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif isinstance(part, dict) and kind == "refusal" and isinstance(part.get("refusal"), str):
            texts.append(part["refusal"])
        elif kind in _TEXT_PARTS or not isinstance(kind, str):
            raise BadRequest(f"{where}[{index}] must be a part of type text with a string in text", param="messages")
        elif kind not in _HIDDEN_PARTS:
            raise BadRequest(f"{where}[{index}] is {kind[:40]!r}, but this model takes text only", param="messages")
    return "\n".join(texts)


def _tool_calls(where: str, calls: object) -> list[dict[str, Any]]:
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise BadRequest(f"{where} must be a list of objects", param="messages")
    out = []
    for index, call in enumerate(calls):
        function = call.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRequest(f"{where}[{index}].function must be an object with a name", param="messages")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                parsed = msgspec.json.decode(arguments or "{}")
            except (msgspec.DecodeError, RecursionError):
                parsed = None
            arguments = parsed if isinstance(parsed, dict) else arguments
        out.append({**call, "function": {**function, "arguments": arguments if arguments is not None else {}}})
    return out


def template_kwargs(body: ChatBody | TokenizeBody) -> dict[str, Any]:
    """The template's variables: as given, and the switches for thinking under all the names that clients use."""
    given = dict(body.chat_template_kwargs or {})
    for name in given:
        if name in _OURS:
            raise BadRequest(f"chat_template_kwargs must not hold {name}", param="chat_template_kwargs")
    if not isinstance(body, ChatBody):
        return given
    effort = body.reasoning_effort or (body.reasoning or {}).get("effort")
    kind = (body.thinking or {}).get("type")
    switches = (
        body.enable_thinking,
        None if kind is None else kind != "disabled",
        None if body.think is None else body.think not in (False, "none"),
        None if effort is None else effort != "none",
    )
    switch = next((value for value in switches if value is not None), None)
    if switch is not None:
        given.setdefault("enable_thinking", switch)
    if isinstance(effort, str):
        given.setdefault("reasoning_effort", effort)
    return given


def _chars(message: Mapping[str, Any]) -> int:
    return len(message["content"])


async def _check_length(server: Server, messages: Sequence[Mapping[str, Any]]) -> None:
    """Refuse by one long message alone, before the template runs over all of it."""
    longest = max(messages, key=_chars)["content"]
    await server.check_length(longest)
