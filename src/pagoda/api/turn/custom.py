"""Custom tools, which are called with a text: functions of one text for the model, and the text for the client."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from pagoda.errors import BadRequest
from pagoda.text.lark_expression import lark_expression

INPUT = "input"
"""As a function, a custom tool is one whose only argument has this name."""
_SYNTAXES = {"regex": "regular expression", "lark": "Lark grammar"}
_OPENING = re.compile(rf'\s*\{{\s*"{INPUT}"\s*:\s*"')
# Whole characters of a JSON string: an escape is not cut, nor a pair of surrogates.
_WHOLE = re.compile(
    r'(?:[^"\\]|\\["\\/bfnrt]|\\u(?![dD][89abAB])[0-9a-fA-F]{4}'
    r"|\\u[dD][89abAB][0-9a-fA-F]{2}(?:\\u[0-9a-fA-F]{4}|(?=[^\\]|\\[^u])))*"
)


def custom_function(given: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """The function that stands for a custom tool, and whether its format is enforced: told to the model it always is.

    Raises BadRequest for a tool without a name, or with a format that is none.
    """
    name, form = given.get("name"), given.get("format") or {"type": "text"}
    if not isinstance(name, str) or not name:
        raise BadRequest("tools: a custom tool needs a name", param="tools")
    text: dict[str, Any] = {"type": "string"}
    parameters = {"type": "object", "properties": {INPUT: text}, "required": [INPUT]}
    description = str(given.get("description") or "")
    function: dict[str, Any] = {"name": name, "description": description, "parameters": parameters}
    kind = form.get("type") if isinstance(form, dict) else None
    if kind == "text":
        return function, True
    syntax, definition = _grammar(form)
    if kind != "grammar" or syntax not in _SYNTAXES or not isinstance(definition, str):
        raise BadRequest(
            f"tools: the format of the custom tool {name[:64]!r} is not one",
            remedy='It is {"type": "text"} or {"type": "grammar", "grammar": {"syntax": "regex" or "lark", '
            '"definition": "..."}}, in responses without the inner braces',
            param="tools",
        )
    function["description"] += f"\n\n{INPUT} must match this {_SYNTAXES[syntax]}:\n{definition}"
    pattern = definition if syntax == "regex" else lark_expression(definition)
    if pattern is None:
        return function, False
    text["pattern"] = f"^(?:{pattern})$"
    function["strict"] = True
    return function, True


def _grammar(form: object) -> tuple[Any, Any]:
    """Syntax and definition, which chats put into an object of their own."""
    inner = form.get("grammar", form) if isinstance(form, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("syntax"), str):
        return None, None
    return inner["syntax"], inner.get("definition")


def function_call(call: Any) -> Any:
    """An earlier call of a custom tool as one of the function that stands for it; any other call as it is."""
    custom = call.get("custom") if isinstance(call, dict) and call.get("type") == "custom" else None
    if not isinstance(custom, dict):
        return call
    arguments = json.dumps({INPUT: custom.get("input")}, ensure_ascii=False)
    others = {name: value for name, value in call.items() if name != "custom"}
    return {**others, "type": "function", "function": {"name": custom.get("name"), "arguments": arguments}}


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
        text = str(json.loads(f'"{self._raw[start : self._at]}"', strict=False))
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")  # halves of pairs are no text

    def finish(self) -> str:
        """What is left of the text: all of it, where the model did not write the arguments it was told to."""
        return self._raw if self._at is None else ""
