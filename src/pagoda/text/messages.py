"""Chat messages as clients send them, made into what chat templates expect."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pagoda.errors import BadRequest

MEDIA_PARTS = ("image", "video")
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}


@dataclass(frozen=True, slots=True)
class MessageStyle:
    """What a template expects. `parts`: it walks over a list of content parts; `strings`: it takes strings too.

    `null_content`: it knows messages that have tool calls and no content. `media`: it has places for pictures. `mark`:
    it has none, and this text stands for a picture.
    """

    parts: bool = False
    strings: bool = True
    null_content: bool = False
    media: bool = False
    mark: str = ""


def prepare_messages(messages: Sequence[Any], style: MessageStyle) -> list[dict[str, Any]]:
    """Checked messages with at most one system message, which comes first. Raises BadRequest."""
    if not messages:
        raise BadRequest("messages must not be empty", param="messages")
    prepared = [_prepare(i, message, style) for i, message in enumerate(messages)]
    systems = [message for message in prepared if message["role"] == "system"]
    if not systems or (len(systems) == 1 and prepared[0] is systems[0]):
        return prepared
    texts = [text for message in systems if (text := content_text(message["content"]))]
    merged = systems[0] | {"content": _content("\n\n".join(texts), style)}
    return [merged, *(message for message in prepared if message["role"] != "system")]


def content_text(content: Any) -> str:
    """The text of a message's content, of whatever form."""
    if isinstance(content, list):
        if any("text" not in part for part in content):
            raise BadRequest("several system messages become one, which can't hold pictures", param="messages")
        return "\n".join(part["text"] for part in content)
    return content or ""


def _prepare(index: int, message: Any, style: MessageStyle) -> dict[str, Any]:
    where = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise BadRequest(f"{where} must be an object", param="messages")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise BadRequest(f"{where}.role must be a string such as user, assistant or system", param="messages")
    # Templates ask whether a key is there; clients send null for what is not.
    kept = {k: v for k, v in message.items() if v is not None and not (k == "tool_calls" and v == [])}
    kept["role"] = "system" if role == "developer" else role
    if "tool_calls" in kept:
        kept["tool_calls"] = [_tool_call(where, call) for call in _list(where + ".tool_calls", kept["tool_calls"])]
    content = message.get("content")
    if content is None and "tool_calls" in kept and style.null_content:
        kept["content"] = None
    else:
        kept["content"] = _content(_parts(where + ".content", "" if content is None else content, style), style)
    return kept


def _list(where: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise BadRequest(f"{where} must be a list", param="messages")
    return value


def _parts(where: str, content: Any, style: MessageStyle) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRequest(f"{where} must be a string or a list of parts", param="messages")
    return [_content_part(f"{where}[{i}]", part, style) for i, part in enumerate(content)]


def _content_part(where: str, part: Any, style: MessageStyle) -> dict[str, Any]:
    if style.media and _is_media(part):
        return {"type": part["type"]}
    if style.mark and isinstance(part, Mapping) and part.get("type") == "image":
        return {"type": "text", "text": style.mark}
    return {"type": "text", "text": _part_text(where, part)}


def _is_media(part: Any) -> bool:
    """The place of a picture, which itself goes another way: see `pagoda.media.sources`."""
    return isinstance(part, Mapping) and part.get("type") in MEDIA_PARTS


def _part_text(where: str, part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(kind, str):
        raise BadRequest(f'{where} must be an object such as {{"type": "text", "text": "..."}}', param="messages")
    if kind not in _TEXT_PARTS:
        raise BadRequest(f"{where} is of type {kind[:40]!r}, but this model takes text only", param="messages")
    text = part.get(_TEXT_PARTS[kind])
    if not isinstance(text, str):
        raise BadRequest(f"{where}.{_TEXT_PARTS[kind]} must be a string", param="messages")
    return text


def _content(content: str | list[dict[str, Any]], style: MessageStyle) -> str | list[dict[str, Any]]:
    if not style.parts:
        return content_text(content)
    if isinstance(content, str) and not style.strings:
        return [{"type": "text", "text": content}]
    return content


def _tool_call(where: str, call: Any) -> Any:
    """Arguments come as a string of JSON, and templates want the object in it."""
    if not isinstance(call, Mapping):
        raise BadRequest(f"{where}.tool_calls must hold objects", param="messages")
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(arguments := function.get("arguments"), str):
        return dict(call)
    try:
        parsed = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return dict(call)  # the model wrote it so; the template shows it as it is
    return dict(call) | {"function": dict(function) | {"arguments": parsed}} if isinstance(parsed, dict) else dict(call)
