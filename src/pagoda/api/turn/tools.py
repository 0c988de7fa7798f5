"""The tools of a chat: which functions its model is told of, and which of them it may or must call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pagoda.api.turn.custom import custom_function
from pagoda.errors import BadRequest
from pagoda.text.tools import Schemas

MAX_FORMAT_CHARS = 256 << 10
"""Of all custom tools of a request together: reading them takes time that others wait for."""
_FORCED = ("required", "any")
_KINDS = ("function", "custom")
Choice = str | dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class ChatTools:
    """`custom` are the functions that stand for custom tools; `ignored` names what has no effect."""

    functions: list[dict[str, Any]]
    custom: frozenset[str]
    ignored: tuple[str, ...]


def read_tools(given: Sequence[dict[str, Any]]) -> ChatTools:
    """Raises BadRequest for a custom tool that is none; tools that a server would run are left out."""
    functions, custom, ignored = [], set(), []
    format_chars = 0
    for tool in given:
        kind = tool.get("type", "function")
        if kind == "function":
            functions.append(tool)
        elif kind == "custom":
            function, enforced = custom_function(_inner(tool))
            format_chars += len(function["description"]) if _inner(tool).get("format") else 0
            if format_chars > MAX_FORMAT_CHARS:
                most = f"{MAX_FORMAT_CHARS >> 10} KiB"
                raise BadRequest(f"tools: the formats of custom tools hold more than {most} together", param="tools")
            functions.append({"type": "function", "function": function})
            custom.add(function["name"])
            ignored += [] if enforced else [f"tools.{function['name']}.format"]
        else:
            ignored.append(f"tools.{kind}")
    return ChatTools(functions, frozenset(custom), tuple(dict.fromkeys(ignored)))


def allowed(tools: list[dict[str, Any]], choice: Choice) -> tuple[list[dict[str, Any]], Choice]:
    """What `allowed_tools` leaves of the tools, and its mode; it is nested in chats and flat in responses."""
    if not isinstance(choice, dict) or choice.get("type") != "allowed_tools":
        return tools, choice
    given = choice.get("allowed_tools", choice)
    named, mode = (given.get("tools"), given.get("mode", "auto")) if isinstance(given, dict) else (None, None)
    if not isinstance(named, list) or mode not in ("auto", "required"):
        raise BadRequest("allowed_tools needs a list of tools, and a mode: auto or required", param="tool_choice")
    names = [_inner(each).get("name") for each in named if isinstance(each, dict)]
    return [tool for tool in tools if _inner(tool).get("name") in names], mode


def forced(choice: Choice, schemas: Schemas) -> Schemas | None:
    """The functions of which one must be called; None where the model decides."""
    if choice is None or choice in ("none", "auto"):
        return None
    name = _named(choice)
    if not schemas:
        raise BadRequest("tool_choice asks for a call, but there are no tools", param="tool_choice")
    if name is None:
        return schemas
    if name not in schemas:
        raise BadRequest(f"tool_choice names {name[:64]!r}, which is not among the tools", param="tool_choice")
    return {name: schemas[name]}


def _inner(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """What chats say of a tool, or choose it by, lies under the name of its kind; responses have it beside that."""
    found = next((tool[kind] for kind in _KINDS if kind in tool), tool)
    return found if isinstance(found, Mapping) else {}


def _named(choice: str | dict[str, Any]) -> str | None:
    """The tool's name; None: any tool."""
    if isinstance(choice, str):
        if choice in _FORCED:
            return None
        raise BadRequest("tool_choice must be auto, none, required or name a function", param="tool_choice")
    name = _inner(choice).get("name")
    if choice.get("type", "function") not in _KINDS or not isinstance(name, str):
        raise BadRequest(
            'tool_choice must be a word or {"type": "function", "function": {"name": "..."}}', param="tool_choice"
        )
    return name
