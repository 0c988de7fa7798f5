"""How each family of models writes its tool calls: found from the chat template, read, and begun in its place."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from pagoda.errors import BadRequest, ConfigError
from pagoda.text import harmony
from pagoda.text.tool_parsers.json_calls import bare_objects, deepseek_call, kimi_call, listed_calls, mistral_calls
from pagoda.text.tool_parsers.pythonic import pythonic_calls
from pagoda.text.tool_parsers.reading import Reader
from pagoda.text.tool_parsers.scanner import CallScanner
from pagoda.text.tool_parsers.xml_calls import minimax_calls, tagged_call

Schemas = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """`blocks`, `noise`, `bare`: see `CallScanner`. `inside`: further special tokens that calls are made of.

    `required` and `named` are how an answer that must be a call begins, of any function or of {name}; a named one
    goes as far as to make it a call for certain.
    """

    required: str
    named: str
    blocks: Mapping[str, Reader] = field(default_factory=dict)
    noise: tuple[str, ...] = ()
    inside: tuple[str, ...] = ()
    bare: Reader | None = None
    short_ids: bool = False

    @property
    def marks(self) -> tuple[str, ...]:
        return (*self.blocks, *self.noise, *self.inside)

    def scanner(self, schemas: Schemas) -> CallScanner:
        return CallScanner(self.blocks, schemas, noise=self.noise, bare=self.bare)

    def opening(self, name: str | None) -> str:
        """How an answer begins that must call this function, or any."""
        if name is None:
            return self.required
        if re.fullmatch(r"[\w.:/-]{1,256}", name) is None:
            raise BadRequest(
                "the function's name holds characters that a call can't be begun with", param="tool_choice"
            )
        return self.named.replace("{name}", name)


def _tagged(required: str, named: str) -> ToolFormat:
    return ToolFormat(required, named, {"<tool_call>": tagged_call}, noise=("</tool_call>",))


def _listed(mark: str, *noise: str) -> ToolFormat:
    begun = mark + '[{"name": "'
    return ToolFormat(begun, begun + '{name}", "arguments": {', {mark: listed_calls}, noise)


def _mistral(required: str, named: str) -> ToolFormat:
    mark = "[TOOL_CALLS]"
    return ToolFormat(
        mark + required, mark + named, {mark: mistral_calls}, inside=("[ARGS]", "[CALL_ID]"), short_ids=True
    )


def _deepseek(required: str, named: str) -> ToolFormat:
    call = "<｜tool▁call▁begin｜>"
    return ToolFormat(
        _DEEPSEEK_CALLS + call + required,
        _DEEPSEEK_CALLS + call + named,
        {call: deepseek_call},
        noise=(_DEEPSEEK_CALLS, "<｜tool▁calls▁end｜>", "<｜tool▁call▁end｜>"),
        inside=(_DEEPSEEK_SEPARATOR,),
    )


_DEEPSEEK_CALLS, _DEEPSEEK_SEPARATOR = "<｜tool▁calls▁begin｜>", "<｜tool▁sep｜>"
_DEEPSEEK_V3 = "function" + _DEEPSEEK_SEPARATOR
_KIMI = "<|tool_calls_section_begin|><|tool_call_begin|>functions."
_NAME = '{"name": "'

_FORMATS: Mapping[str, ToolFormat] = MappingProxyType(
    {
        "hermes": _tagged("<tool_call>\n" + _NAME, "<tool_call>\n" + _NAME + '{name}", "arguments": {'),
        "qwen3_coder": _tagged("<tool_call>\n<function=", "<tool_call>\n<function={name}>\n"),
        "glm45": _tagged("<tool_call>", "<tool_call>{name}\n"),
        "mistral": _mistral("[" + _NAME, "[" + _NAME + '{name}", "arguments": {'),
        "mistral_args": _mistral("", "{name}[ARGS]{"),
        "llama3_json": ToolFormat(
            _NAME, _NAME + '{name}", "parameters": {', {"<|python_tag|>": bare_objects}, bare=bare_objects
        ),
        "pythonic": ToolFormat("[", "[{name}(", bare=pythonic_calls),
        "llama4_pythonic": ToolFormat(
            "[", "[{name}(", {"<|python_start|>": pythonic_calls}, noise=("<|python_end|>",), bare=pythonic_calls
        ),
        "lfm2": ToolFormat(
            "<|tool_call_start|>[",
            "<|tool_call_start|>[{name}(",
            {"<|tool_call_start|>": pythonic_calls},
            noise=("<|tool_call_end|>",),
        ),
        "deepseek_v3": _deepseek(_DEEPSEEK_V3, _DEEPSEEK_V3 + "{name}\n```json\n{"),
        "deepseek_v31": _deepseek("", "{name}" + _DEEPSEEK_SEPARATOR + "{"),
        "kimi_k2": ToolFormat(
            _KIMI,
            _KIMI + "{name}:0<|tool_call_argument_begin|>{",
            {"<|tool_call_begin|>": kimi_call},
            noise=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_end|>"),
            inside=("<|tool_call_argument_begin|>",),
        ),
        "minimax_m2": ToolFormat(
            '<minimax:tool_call>\n<invoke name="',
            '<minimax:tool_call>\n<invoke name="{name}">\n',
            {"<minimax:tool_call>": minimax_calls},
            noise=("</minimax:tool_call>",),
        ),
        "granite": _listed("<|tool_call|>"),
        "jamba": _listed("<tool_calls>", "</tool_calls>"),
        "phi4_mini_json": _listed("functools"),
        "openai": ToolFormat(harmony.PREFILL_REQUIRED, harmony.PREFILL_NAMED, inside=harmony.MARKS),
    }
)
_OTHER_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "granite4": "hermes",
        "qwen3_xml": "qwen3_coder",
        "qwen3_json": "hermes",
        "glm47": "glm45",
        "llama4_json": "llama3_json",
        "deepseek_v32": "deepseek_v31",
    }
)
# What a chat template says about calls -> how they are written; the first that holds counts.
_FOUND_BY: tuple[tuple[str, str], ...] = (
    ("<|channel|>", "openai"),
    ("[ARGS]", "mistral_args"),
    ("[TOOL_CALLS]", "mistral"),
    ("<|tool_calls_section_begin|>", "kimi_k2"),
    ("<minimax:tool_call>", "minimax_m2"),
    ("<function=", "qwen3_coder"),
    ("<arg_key>", "glm45"),
    ("<|tool_call_start|>", "lfm2"),
    ("<|python_start|>", "llama4_pythonic"),
    ("<tool_calls>", "jamba"),
    ("<tool_call>", "hermes"),
    ("<|tool_call|>", "granite"),
    ("functools", "phi4_mini_json"),
    ("[func_name1(", "pythonic"),
    ("<|python_tag|>", "llama3_json"),
    ('"parameters": dictionary', "llama3_json"),
)


def is_harmony(form: ToolFormat | None) -> bool:
    return form is _FORMATS["openai"]


def find_tool_format(template: str, name: str | None = None) -> ToolFormat | None:
    """The format that the chat template shows, or the one named with --tool-call-parser; None: there is none."""
    if name == "none":
        return None
    if name is not None and name != "auto":
        form = _FORMATS.get(_OTHER_NAMES.get(name, name))
        if form is None:
            known = ", ".join((*_FORMATS, *_OTHER_NAMES, "none"))
            raise ConfigError(
                f"--tool-call-parser {name} is not known", remedy=f"Leave it out to find it by itself, or give: {known}"
            )
        return form
    if "tools" not in template:
        return None
    if _DEEPSEEK_CALLS in template:
        return _FORMATS["deepseek_v3" if "```json" in template else "deepseek_v31"]
    return next((_FORMATS[found] for mark, found in _FOUND_BY if mark in template), None)


def function_schemas(tools: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The functions' names and the schemas of their arguments. Raises BadRequest where a name is missing."""
    schemas: dict[str, Mapping[str, Any]] = {}
    for index, tool in enumerate(tools):
        given = tool.get("function")
        function = given if isinstance(given, Mapping) else {}
        name = function.get("name")
        if not isinstance(name, str) or not name:
            raise BadRequest(f"tools[{index}].function.name must be a string", param="tools")
        parameters = function.get("parameters")
        schemas[name] = parameters if isinstance(parameters, Mapping) else {}
    return schemas
