"""How each family of models writes its tool calls: found from the chat template, read, and begun in its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

from pagoda.errors import BadRequest, ConfigError
from pagoda.text import harmony
from pagoda.text.tool_grammar import CallForm
from pagoda.text.tool_parsers.json_calls import bare_objects, deepseek_call, kimi_call, listed_calls, mistral_calls
from pagoda.text.tool_parsers.marked_calls import GEMMA4_STRING, STRING, marked_call
from pagoda.text.tool_parsers.pythonic import pythonic_calls
from pagoda.text.tool_parsers.reading import Reader
from pagoda.text.tool_parsers.scanner import CallScanner
from pagoda.text.tool_parsers.xml_calls import minimax_calls, tagged_call

Schemas = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """`blocks`, `noise`, `bare`: see `CallScanner`. `inside`: further special tokens that calls are made of.

    `written` is how a call is written where a grammar makes the model write one.
    """

    written: CallForm
    blocks: Mapping[str, Reader] = field(default_factory=dict)
    noise: tuple[str, ...] = ()
    inside: tuple[str, ...] = ()
    bare: Reader | None = None
    short_ids: bool = False

    @property
    def marks(self) -> tuple[str, ...]:
        return (*self.blocks, *self.noise, *self.inside)

    @property
    def mark(self) -> str | None:
        """What calls begin with and nothing else does; None: only their whole form tells."""
        return next((mark for mark in self.marks if self.written.start.startswith(mark)), None)

    def scanner(self, schemas: Schemas) -> CallScanner:
        return CallScanner(self.blocks, schemas, noise=self.noise, bare=self.bare)


_NAME, _ARGUMENTS = '{"name": "', '", "arguments": '


def _tagged(written: CallForm) -> ToolFormat:
    return ToolFormat(written, {"<tool_call>": tagged_call}, noise=("</tool_call>",))


def _object_list(opening: str, closing: str = "]") -> CallForm:
    return CallForm(_NAME, _ARGUMENTS, "}", opening + "[", ", ", closing)


def _listed(mark: str, *noise: str) -> ToolFormat:
    return ToolFormat(_object_list(mark, "".join(("]", *noise))), {mark: listed_calls}, noise)


def _mistral(written: CallForm) -> ToolFormat:
    return ToolFormat(written, {"[TOOL_CALLS]": mistral_calls}, inside=("[ARGS]", "[CALL_ID]"), short_ids=True)


def _deepseek(before: str, between: str, after: str) -> ToolFormat:
    call, end, last = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"
    return ToolFormat(
        CallForm(call + before, between, after + end, _DEEPSEEK_CALLS, "\n", last),
        {call: deepseek_call},
        noise=(_DEEPSEEK_CALLS, last, end),
        inside=(_DEEPSEEK_SEPARATOR,),
    )


def _python_list(opening: str = "", closing: str = "") -> CallForm:
    return CallForm("", "(", ")", opening + "[", ", ", "]" + closing, "python")


_DEEPSEEK_CALLS, _DEEPSEEK_SEPARATOR = "<｜tool▁calls▁begin｜>", "<｜tool▁sep｜>"
_KIMI_CALLS, _KIMI_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
_HERMES = CallForm("<tool_call>\n" + _NAME, _ARGUMENTS, "}\n</tool_call>")
_CODER = CallForm(
    "<tool_call>\n<function=", ">\n", "</function>\n</tool_call>",
    arguments="tags", key="<parameter=", value=">\n", end="\n</parameter>\n",
)  # fmt: skip
_GLM = CallForm(
    "<tool_call>", "\n", "</tool_call>",
    arguments="tags", key="<arg_key>", value="</arg_key>\n<arg_value>", end="</arg_value>\n",
)  # fmt: skip
_MINIMAX = CallForm(
    '<invoke name="', '">\n', "</invoke>\n", "<minimax:tool_call>\n", "", "</minimax:tool_call>",
    "tags", '<parameter name="', '">', "</parameter>\n",
)  # fmt: skip
_LLAMA = CallForm(_NAME, '", "parameters": ', "}", separator="; ")
_KIMI = CallForm(
    "<|tool_call_begin|>functions.", ":0<|tool_call_argument_begin|>", "<|tool_call_end|>", _KIMI_CALLS, "", _KIMI_END
)
_HARMONY = CallForm("<|channel|>commentary to=functions.", " <|constrain|>json<|message|>", "", separator="")

_FORMATS: Mapping[str, ToolFormat] = MappingProxyType(
    {
        "hermes": _tagged(_HERMES),
        "qwen3_coder": _tagged(_CODER),
        "glm45": _tagged(_GLM),
        "mistral": _mistral(_object_list("[TOOL_CALLS]")),
        "mistral_args": _mistral(CallForm("[TOOL_CALLS]", "[ARGS]", "", separator="")),
        "llama3_json": ToolFormat(_LLAMA, {"<|python_tag|>": bare_objects}, bare=bare_objects),
        "pythonic": ToolFormat(_python_list(), bare=pythonic_calls),
        "llama4_pythonic": ToolFormat(
            _python_list(), {"<|python_start|>": pythonic_calls}, noise=("<|python_end|>",), bare=pythonic_calls
        ),
        "lfm2": ToolFormat(
            _python_list("<|tool_call_start|>", "<|tool_call_end|>"),
            {"<|tool_call_start|>": pythonic_calls},
            noise=("<|tool_call_end|>",),
        ),
        "deepseek_v3": _deepseek("function" + _DEEPSEEK_SEPARATOR, "\n```json\n", "\n```"),
        "deepseek_v31": _deepseek("", _DEEPSEEK_SEPARATOR, ""),
        "kimi_k2": ToolFormat(
            _KIMI,
            {"<|tool_call_begin|>": kimi_call},
            noise=(_KIMI_CALLS, _KIMI_END, "<|tool_call_end|>"),
            inside=("<|tool_call_argument_begin|>",),
        ),
        "minimax_m2": ToolFormat(_MINIMAX, {"<minimax:tool_call>": minimax_calls}, noise=("</minimax:tool_call>",)),
        "functiongemma": ToolFormat(
            CallForm(
                "<start_function_call>call:", "{", "}<end_function_call>", separator="", arguments="marked", end=STRING
            ),
            {"<start_function_call>": marked_call},
            noise=("<end_function_call>", "<start_function_response>"),
            inside=(STRING,),
        ),
        "gemma4": ToolFormat(
            CallForm("<|tool_call>call:", "{", "}<tool_call|>", separator="", arguments="marked", end=GEMMA4_STRING),
            {"<|tool_call>": partial(marked_call, mark=GEMMA4_STRING)},
            noise=("<tool_call|>", "<|tool_response>"),
            inside=(GEMMA4_STRING,),
        ),
        "granite": _listed("<|tool_call|>"),
        "jamba": _listed("<tool_calls>", "</tool_calls>"),
        "phi4_mini_json": _listed("functools"),
        "openai": ToolFormat(_HARMONY, inside=harmony.MARKS),
    }
)
PLAIN_FORMAT = _FORMATS["hermes"]
"""For models whose templates show none, where a grammar makes them call."""
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
    ("<start_function_call>", "functiongemma"),
    ("<|tool_call>", "gemma4"),
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
