"""The items of a response's input as a ChatBody: messages, calls and their results, reasoning, tools."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pagoda.api.responses.output import new_id
from pagoda.api.responses.protocol import ResponsesBody
from pagoda.api.responses.tools import Tool, Tools
from pagoda.api.turn.bodies import ChatBody
from pagoda.errors import BadRequest

_ALIKE = (
    "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed",
    "stop", "stop_token_ids", "ignore_eos", "logit_bias", "reasoning", "enable_thinking", "chat_template_kwargs",
    "thinking_token_budget",
    "parallel_tool_calls", "cache_salt", "priority", "deadline_s",
)  # fmt: skip
_PREFIX = {
    "message": "msg", "reasoning": "rs", "function_call": "fc", "function_call_output": "fco",
    "custom_tool_call": "ctc", "custom_tool_call_output": "ctco",
}  # fmt: skip
_ROLES = ("user", "assistant", "system", "developer")
_LOGPROBS = "message.output_text.logprobs"
Items = Sequence[Mapping[str, Any]]


def given_items(body: ResponsesBody) -> list[dict[str, Any]]:
    """The items of this call, each with an id and a type."""
    given = body.input if body.input is not None else []
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    out = []
    for index, item in enumerate(items):
        kind = item.get("type") or "message"
        if not isinstance(kind, str):
            raise BadRequest(f"input[{index}].type must be a string", param="input")
        found = item.get("id")
        out.append({**item, "type": kind, "id": found if isinstance(found, str) else new_id(_PREFIX.get(kind, "item"))})
    return out


def chat_body(body: ResponsesBody, items: Items, tools: Tools) -> ChatBody:
    """The call as /v1/chat/completions would get it. Raises BadRequest for what cannot be honoured."""
    _refuse(body)
    asked = ChatBody(
        model=body.model,
        messages=_messages(body.instructions, items),
        tools=tools.functions or None,
        tool_choice=tools.choice(body.tool_choice),
        response_format=_response_format(body.text),
        logprobs=bool(body.top_logprobs) or _LOGPROBS in (body.include or ()),
        **{name: getattr(body, name) for name in _ALIKE},
    )
    asked.top_logprobs = body.top_logprobs if asked.logprobs else None
    asked.max_completion_tokens = body.max_output_tokens
    return asked


def ignored_parts(body: ResponsesBody, items: Items, tools: Tools) -> list[str]:
    """What has no effect here: tools and items of servers that run tools themselves."""
    kinds = [*tools.ignored]
    kinds += [f"input.{item['type']}" for item in items if item["type"] not in _PREFIX]
    kinds += [f"include.{name}" for name in body.include or () if name != _LOGPROBS]
    kinds += [f"text.{name}" for name in body.text or () if name != "format"]
    return list(dict.fromkeys(kinds))


def _refuse(body: ResponsesBody) -> None:
    if body.prompt is not None:
        raise BadRequest("prompt: prompts are not stored here; send instructions and input", param="prompt")
    if body.conversation is not None:
        raise BadRequest("conversation: use previous_response_id to go on from a response", param="conversation")
    if body.background and not body.store:
        raise BadRequest("background needs store: true: its answer is asked for later", param="background")
    if body.background and body.stream:
        raise BadRequest("background needs stream: false: its answer is asked for later", param="background")
    limit = body.max_output_tokens
    if limit is not None and not 1 <= limit < 2**31:
        raise BadRequest("max_output_tokens must be at least 1", param="max_output_tokens")


def _messages(instructions: str | None, items: Items) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = [{"role": "system", "content": instructions}] if instructions else []
    for index, item in enumerate(items):
        where = f"input[{index}]"
        kind = item["type"]
        if kind == "message":
            _add_message(where, messages, item)
        elif kind in ("function_call", "custom_tool_call"):
            _add_call(where, messages, item)
        elif kind in ("function_call_output", "custom_tool_call_output"):
            content = _content(f"{where}.output", item.get("output"))
            messages.append(
                {"role": "tool", "tool_call_id": _string(where, item, "call_id"), "content": content},
            )
        elif kind == "reasoning":
            text = _reasoning(item)
            if text:
                messages.append({"role": "assistant", "reasoning_content": text})
        elif kind == "item_reference":
            raise BadRequest(
                f"{where}: references to items are not resolved here",
                remedy="Send the items themselves, or previous_response_id",
                param="input",
            )
    return messages or [{"role": "user", "content": ""}]


def _add_message(where: str, messages: list[dict[str, Any]], item: Mapping[str, Any]) -> None:
    role = item.get("role")
    if role not in _ROLES:
        raise BadRequest(f"{where}.role must be user, assistant, system or developer", param="input")
    content = _content(f"{where}.content", item.get("content"))
    last = messages[-1] if messages else {}
    if role == "assistant" and last.get("role") == role and not {"content", "tool_calls"} & set(last):
        last["content"] = content
    else:
        messages.append({"role": role, "content": content})


def _add_call(where: str, messages: list[dict[str, Any]], item: Mapping[str, Any]) -> None:
    name, namespace = _string(where, item, "name"), item.get("namespace")
    kind, text = ("custom", "input") if item["type"] == "custom_tool_call" else ("function", "arguments")
    tool = Tool(name, namespace if isinstance(namespace, str) else None)
    called = {"name": tool.function, text: _string(where, item, text)}
    call = {"id": _string(where, item, "call_id"), "type": kind, kind: called}
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant"})
    messages[-1].setdefault("tool_calls", []).append(call)


def _content(where: str, content: Any) -> str | list[dict[str, Any]]:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise BadRequest(f"{where} must be a string or a list of parts", param="input")
    return [_part(part) for part in content]


def _part(part: dict[str, Any]) -> dict[str, Any]:
    if part.get("type") == "input_image":
        image = {"url": part.get("image_url"), "detail": part.get("detail") or "auto"}
        return {"type": "image_url", "image_url": image}
    return part


def _reasoning(item: Mapping[str, Any]) -> str:
    held = [given for name in ("content", "summary") if isinstance(given := item.get(name), list) and given]
    parts = [part for part in (held[0] if held else ()) if isinstance(part, dict)]
    return "\n".join(part["text"] for part in parts if isinstance(part.get("text"), str))


def _string(where: str, item: Mapping[str, Any], name: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise BadRequest(f"{where}.{name} must be a string", param="input")
    return value


def _response_format(text: Mapping[str, Any] | None) -> dict[str, Any] | None:
    given = (text or {}).get("format")
    if given is None:
        return None
    kind = given.get("type") if isinstance(given, dict) else None
    if kind in ("text", "json_object"):
        return {"type": kind}
    if kind == "json_schema":
        return {"type": kind, "json_schema": {name: value for name, value in given.items() if name != "type"}}
    raise BadRequest("text.format.type must be text, json_object or json_schema", param="text")
