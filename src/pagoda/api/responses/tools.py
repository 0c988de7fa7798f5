"""The tools of a response as functions of a chat, and what their calls are in the response again."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pagoda.api.responses.protocol import ResponsesBody
from pagoda.errors import BadRequest
from pagoda.text.lark_expression import lark_expression

INPUT = "input"
"""A custom tool takes a text: as a function, it is one whose only argument has this name."""
_SYNTAXES = {"regex": "regular expression", "lark": "Lark grammar"}
_OPENING = re.compile(rf'\s*\{{\s*"{INPUT}"\s*:\s*"')
# Whole characters of a JSON string: an escape is not cut, nor a pair of surrogates.
_WHOLE = re.compile(
    r'(?:[^"\\]|\\["\\/bfnrt]|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[0-9a-fA-F]{4}|\\u(?![dD][89abAB])[0-9a-fA-F]{4})*'
)


@dataclass(frozen=True, slots=True)
class Tool:
    """What a function of the chat stands for. `namespace`: the group of tools that it is in."""

    name: str
    namespace: str | None = None
    custom: bool = False

    @property
    def function(self) -> str:
        """Its name in the chat, where there are no groups."""
        if self.namespace is None:
            return self.name
        return f"{self.namespace.removesuffix('__')}__{self.name}"


@dataclass(frozen=True, slots=True)
class Tools:
    """`functions` are the chat's tools, `by_function` what they stand for; `ignored` has no effect here."""

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
    """Raises BadRequest for a custom tool without a name, or with a format that is none."""
    tools = Tools()
    _add(tools, body.tools or (), None)
    return tools


def _add(tools: Tools, given: Sequence[Mapping[str, Any]], namespace: str | None) -> None:
    for each in given:
        kind = each.get("type")
        inner = each.get("tools")
        if kind == "namespace" and namespace is None and isinstance(each.get("name"), str) and isinstance(inner, list):
            _add(tools, [tool for tool in inner if isinstance(tool, dict)], each["name"])
        elif kind == "function":
            function = {name: value for name, value in each.items() if name != "type"}
            _keep(tools, function, Tool(str(function.get("name")), namespace))
        elif kind == "custom":
            function, name = _custom(each), str(each["name"])
            if isinstance(form := each.get("format"), dict) and form.get("syntax") and "strict" not in function:
                tools.ignored.append(f"tools.{name}.format")
            _keep(tools, function, Tool(name, namespace, custom=True))
        else:
            tools.ignored.append(f"tools.{kind}")


def _keep(tools: Tools, function: dict[str, Any], tool: Tool) -> None:
    if isinstance(function.get("name"), str):  # else the chat refuses it, by its place
        function["name"] = tool.function
        tools.by_function[tool.function] = tool
    tools.functions.append({"type": "function", "function": function})


def _custom(given: Mapping[str, Any]) -> dict[str, Any]:
    """A function of one text. An expression for that text becomes a part of its schema, and is enforced."""
    name, form = given.get("name"), given.get("format") or {"type": "text"}
    if not isinstance(name, str) or not name:
        raise BadRequest("tools: a custom tool needs a name", param="tools")
    text: dict[str, Any] = {"type": "string"}
    parameters = {"type": "object", "properties": {INPUT: text}, "required": [INPUT]}
    description = str(given.get("description") or "")
    function: dict[str, Any] = {"name": name, "description": description, "parameters": parameters}
    kind = form.get("type") if isinstance(form, dict) else None
    if kind == "text":
        return function
    syntax, definition = (form.get("syntax"), form.get("definition")) if isinstance(form, dict) else (None, None)
    if kind != "grammar" or syntax not in _SYNTAXES or not isinstance(definition, str):
        raise BadRequest(
            f"tools: the format of the custom tool {name[:64]!r} is not one",
            remedy='It is {"type": "text"} or {"type": "grammar", "syntax": "regex" or "lark", "definition": "..."}',
            param="tools",
        )
    function["description"] += f"\n\n{INPUT} must match this {_SYNTAXES[syntax]}:\n{definition}"
    pattern = definition if syntax == "regex" else lark_expression(definition)
    if pattern is not None:  # else the model is told of the grammar, but not held to it
        text["pattern"] = f"^(?:{pattern})$"
        function["strict"] = True
    return function


def custom_arguments(text: str) -> str:
    """The arguments of a function that stands for a custom tool."""
    return json.dumps({INPUT: text}, ensure_ascii=False)


class CustomInput:
    """The text of a custom tool's call, taken out of its arguments as they arrive."""

    def __init__(self) -> None:
        self._raw = ""
        self._at: int | None = None

    def feed(self, arguments: str) -> str:
        """The part of the text that this makes certain."""
        self._raw += arguments
        if self._at is None:
            opened = _OPENING.match(self._raw)
            if opened is None:
                return ""
            self._at = opened.end()
        start = self._at
        found = _WHOLE.match(self._raw, start)
        self._at = start if found is None else found.end()
        return str(json.loads(f'"{self._raw[start : self._at]}"', strict=False))

    def finish(self) -> str:
        """What is left of the text: all of it, where the model did not write the arguments it was told to."""
        return self._raw if self._at is None else ""
