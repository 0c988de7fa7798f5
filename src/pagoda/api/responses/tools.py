"""The tools of a response as functions of a chat, and what their calls are in the response again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pagoda.api.responses.protocol import ResponsesBody


@dataclass(frozen=True, slots=True)
class Tool:
    """What a function of the chat stands for. `namespace`: the group of tools that it is in."""

    name: str
    namespace: str | None = None

    @property
    def function(self) -> str:
        """Its name in the chat, where there are no groups."""
        if self.namespace is None:
            return self.name
        return f"{self.namespace.removesuffix('__')}__{self.name}"


@dataclass(frozen=True, slots=True)
class Tools:
    """`functions` are the chat's tools, `by_function` what their names stand for; `ignored` has no effect here."""

    functions: list[dict[str, Any]] = field(default_factory=list)
    by_function: dict[str, Tool] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)

    def tool(self, function: str) -> Tool:
        return self.by_function.get(function) or Tool(function)

    def choice(self, given: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
        """Which function may or must be called, as chats say it; None where there is nothing to choose from."""
        kind = given.get("type") if isinstance(given, dict) else None
        if not self.functions and kind not in ("function", "custom") and given != "required":
            return None
        if not isinstance(given, dict):
            return given
        if kind in ("function", "custom"):
            return {**given, "type": "function", "name": self._function(given)}
        if kind == "allowed_tools" and isinstance(given.get("tools"), list):
            allowed = [each for each in given["tools"] if isinstance(each, dict)]
            return {**given, "tools": [{"type": "function", "name": self._function(each)} for each in allowed]}
        return given

    def _function(self, given: Mapping[str, Any]) -> Any:
        """The function that a choice names: by the tool's own name, with or without its namespace."""
        name, namespace = given.get("name"), given.get("namespace")
        found = [
            function
            for function, tool in self.by_function.items()
            if name in (function, tool.name) and namespace in (None, tool.namespace)
        ]
        return found[0] if found else name


def read_tools(body: ResponsesBody) -> Tools:
    tools = Tools()
    _add(tools, body.tools or (), None)
    return tools


def _add(tools: Tools, given: Sequence[Mapping[str, Any]], namespace: str | None) -> None:
    for each in given:
        kind = each.get("type")
        inner = each.get("tools")
        if kind == "namespace" and namespace is None and isinstance(each.get("name"), str) and isinstance(inner, list):
            _add(tools, [tool for tool in inner if isinstance(tool, dict)], each["name"])
        elif kind in ("function", "custom"):
            function = {name: value for name, value in each.items() if name != "type"}
            _keep(tools, kind, function, Tool(str(function.get("name")), namespace))
        else:
            tools.ignored.append(f"tools.{kind}")


def _keep(tools: Tools, kind: str, function: dict[str, Any], tool: Tool) -> None:
    if isinstance(function.get("name"), str):  # else the chat refuses it, by its place
        function["name"] = tool.function
        tools.by_function[tool.function] = tool
    tools.functions.append({"type": kind, kind: function})
