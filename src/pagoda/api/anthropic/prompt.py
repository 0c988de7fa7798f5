"""Anthropic's requests as a ChatBody: system and content blocks, tools, and the results of tools."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pagoda.api.anthropic.protocol import CountBody, MessagesBody
from pagoda.api.turn.bodies import ChatBody
from pagoda.errors import BadRequest

_BILLING = "x-anthropic-billing-header:"
_NO_EFFECT = ("redacted_thinking",)
_TOOL_CHOICES = {"auto": "auto", "none": "none", "any": "required"}


def chat_body(body: CountBody) -> ChatBody:
    """The call as /v1/chat/completions would get it. Raises BadRequest for what cannot be honoured."""
    if not body.messages:
        raise BadRequest("messages must not be empty", param="messages")
    system = _system(body.system)
    messages = [{"role": "system", "content": system}] if system else []
    for index, message in enumerate(body.messages):
        messages += _messages(f"messages[{index}]", message)
    last = messages[-1]
    tools, _ = _tools(body.tools)
    asked = ChatBody(
        model=body.model,
        messages=messages,
        tools=tools or None,
        tool_choice=_tool_choice(body.tool_choice) if tools else None,
        parallel_tool_calls=not (body.tool_choice or {}).get("disable_parallel_tool_use", False),
        thinking=body.thinking,
        continue_final_message=last.get("role") == "assistant"
        and bool(last.get("content"))
        and "tool_calls" not in last,
    )
    if isinstance(body, MessagesBody):
        asked.max_tokens = body.max_tokens
        asked.stop = body.stop_sequences
        asked.temperature = body.temperature
        asked.top_p = body.top_p
        asked.top_k = body.top_k
        asked.response_format = _response_format(body)
    return asked


def ignored_tools(body: CountBody) -> list[str]:
    """Tools that Anthropic's own servers would run; nobody here can."""
    return [f"tools.{name}" for name in _tools(body.tools)[1]]


def _system(given: str | list[dict[str, Any]] | None) -> str | list[dict[str, Any]]:
    """Without the line that differs in each request of one agent: it would make the prompt's cache useless."""
    if not given:
        return ""
    if isinstance(given, str):
        return _unbilled(given)
    parts = [_text_part(f"system[{index}]", block) for index, block in enumerate(given)]
    parts[0]["text"] = _unbilled(parts[0]["text"])
    return [part for part in parts if part["text"]]


def _unbilled(text: str) -> str:
    return text.partition("\n")[2] if text.startswith(_BILLING) else text


def _messages(where: str, message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One message of Anthropic's as those of OpenAI's: results of tools are messages of their own."""
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant", "system"):
        raise BadRequest(f"{where}.role must be user, assistant or system", param="messages")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if not isinstance(content, list):
        raise BadRequest(f"{where}.content must be a string or a list of blocks", param="messages")
    results: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    thoughts: list[str] = []
    texts: list[dict[str, Any]] = []
    for index, block in enumerate(content):
        here = f"{where}.content[{index}]"
        kind = block.get("type") if isinstance(block, Mapping) else None
        if kind == "tool_result":
            results.append(_tool_result(here, block))
        elif kind == "tool_use":
            calls.append(_tool_call(here, block))
        elif kind == "thinking":
            thoughts.append(_string(here, block, "thinking"))
        elif kind not in _NO_EFFECT:
            texts.append(_part(here, block))
    if not (texts or calls or thoughts):
        return results or [{"role": role, "content": ""}]
    alone = len(texts) == 1 and "text" in texts[0]
    own: dict[str, Any] = {"role": role, "content": texts[0]["text"] if alone else texts or None}
    if calls:
        own["tool_calls"] = calls
    if thoughts:
        own["reasoning_content"] = "\n".join(thoughts)
    return [*results, own]


def _part(where: str, block: Any) -> dict[str, Any]:
    """A text, or a picture, which goes on as it is."""
    if isinstance(block, Mapping) and block.get("type") == "image":
        return dict(block)
    return _text_part(where, block)


def _text_part(where: str, block: Any) -> dict[str, Any]:
    kind = block.get("type") if isinstance(block, Mapping) else None
    if not isinstance(kind, str):
        raise BadRequest(f"{where} must be an object with a type", param="messages")
    if kind != "text":
        raise BadRequest(f"{where} is of type {kind[:40]!r}, but this model takes text only", param="messages")
    return {"type": "text", "text": _string(where, block, "text")}


def _string(where: str, block: Mapping[str, Any], name: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise BadRequest(f"{where}.{name} must be a string", param="messages")
    return value


def _tool_call(where: str, block: Mapping[str, Any]) -> dict[str, Any]:
    arguments = block.get("input")
    if not isinstance(arguments, Mapping):
        raise BadRequest(f"{where}.input must be an object", param="messages")
    function = {"name": _string(where, block, "name"), "arguments": dict(arguments)}
    return {"id": _string(where, block, "id"), "type": "function", "function": function}


def _tool_result(where: str, block: Mapping[str, Any]) -> dict[str, Any]:
    content = block.get("content") or ""
    if not isinstance(content, str):
        if not isinstance(content, list):
            raise BadRequest(f"{where}.content must be a string or a list of blocks", param="messages")
        parts = [_part(f"{where}.content[{i}]", part) for i, part in enumerate(content)]
        content = "\n".join(part["text"] for part in parts) if all("text" in part for part in parts) else parts
    return {"role": "tool", "tool_call_id": _string(where, block, "tool_use_id"), "content": content}


def _tools(given: Sequence[Mapping[str, Any]] | None) -> tuple[list[dict[str, Any]], list[str]]:
    """The tools of the client, and the names of those that it expects the server to run."""
    tools: list[dict[str, Any]] = []
    others: list[str] = []
    for index, tool in enumerate(given or ()):
        name = tool.get("name")
        if not isinstance(name, str) or not name:
            raise BadRequest(f"tools[{index}].name must be a string", param="tools")
        schema = tool.get("input_schema")
        if tool.get("type") not in (None, "custom") and schema is None:
            others.append(name)
            continue
        if not isinstance(schema, Mapping):
            raise BadRequest(f"tools[{index}].input_schema must be an object", param="tools")
        function = {"name": name, "description": tool.get("description") or "", "parameters": dict(schema)}
        tools.append({"type": "function", "function": function})
    return tools, others


def _tool_choice(given: Mapping[str, Any] | None) -> str | dict[str, Any] | None:
    if given is None:
        return None
    kind = given.get("type")
    if kind == "tool" and isinstance(given.get("name"), str):
        return {"type": "function", "function": {"name": given["name"]}}
    if not isinstance(kind, str) or kind not in _TOOL_CHOICES:
        raise BadRequest("tool_choice.type must be auto, any, none, or tool with a name", param="tool_choice")
    return _TOOL_CHOICES[kind]


def _response_format(body: MessagesBody) -> dict[str, Any] | None:
    given = (body.output_config or {}).get("format") or body.output_format
    if not given:
        return None
    schema = given.get("schema") if isinstance(given, Mapping) else None
    if not isinstance(schema, Mapping):
        raise BadRequest("output_config.format must be an object with a schema", param="output_config")
    return {"type": "json_schema", "json_schema": {"name": "output", "schema": dict(schema)}}
