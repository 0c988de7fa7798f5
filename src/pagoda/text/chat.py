"""Chat messages to a prompt, through the model's own template."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jinja2
from jinja2 import meta, nodes

from pagoda.errors import BadRequest, ConfigError, ModelError
from pagoda.text.deadline import Deadline, DeadlineExceeded
from pagoda.text.files import read_json, read_text, special_tokens
from pagoda.text.limits import Budget, TemplateLimit
from pagoda.text.literals import Disguise, check_unicode, free_characters
from pagoda.text.messages import MessageStyle, prepare_messages
from pagoda.text.sandbox import ChatEnvironment, TemplateRefusal, render_parts
from pagoda.text.tokenizer import Tokenizer

_MAX_TEMPLATE_CHARS = 1 << 20
_FORBIDDEN_KWARGS = frozenset(
    "messages tools add_generation_prompt continue_final_message chat_template tokenize conversation return_dict "
    "return_tensors padding truncation max_length raise_exception strftime_now namespace range dict cycler joiner "
    "bos_token eos_token unk_token sep_token pad_token cls_token mask_token".split()
)


class ChatTemplate:
    """A model's template, and the one for requests with tools where it has its own. Safe between threads.

    `special_tokens` are the texts (`bos_token`, ...) that templates refer to. A rendering may take `deadline_s`.
    `all_source` is the text of both. `picture` is what stands for a picture where a template has no places for them.
    """

    def __init__(
        self,
        source: str,
        *,
        tool_source: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
        origin: str = "the chat template",
        deadline_s: float = 2.0,
        picture: str = "",
    ) -> None:
        environment = ChatEnvironment()
        self.source = source
        self.all_source = source if tool_source is None else source + tool_source
        self._special_tokens = dict(special_tokens or {})
        self._picture = picture
        self._deadline_s = deadline_s
        self._deadline = Deadline(deadline_s)
        self._plain = _Compiled(environment, source, origin)
        self._with_tools = self._plain if tool_source is None else _Compiled(environment, tool_source, origin)

    def render(
        self,
        messages: Sequence[Any],
        *,
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt as text. Raises BadRequest where the template refuses the messages or breaks on them."""
        options = (add_generation_prompt, continue_final_message)
        text, disguise = self._render(None, messages, tools, *options, template_kwargs)
        return disguise.reveal(text)

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Any],
        *,
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The prompt as token ids: only the template, never a message, can bring in special tokens.

        What the tokenizer puts before a text (bos) comes once, whether the template writes it or not.
        """
        options = (add_generation_prompt, continue_final_message)
        text, disguise = self._render(tokenizer, messages, tools, *options, template_kwargs)
        ids = disguise.encode(tokenizer, text)
        prefix = tokenizer.prefix_ids
        return ids if ids[: len(prefix)] == prefix else prefix + ids

    def _render(
        self,
        tokenizer: Tokenizer | None,
        messages: Sequence[Any],
        tools: Sequence[Any] | None,
        add_generation_prompt: bool,
        continue_final_message: bool,
        template_kwargs: Mapping[str, Any] | None,
    ) -> tuple[str, Disguise]:
        if add_generation_prompt and continue_final_message:
            raise BadRequest("add_generation_prompt and continue_final_message can't both be true")
        compiled = self._with_tools if tools else self._plain
        try:
            kwargs = _check_kwargs(template_kwargs or {}, compiled.names)
            for where, value in (("messages", messages), ("tools", tools), ("chat_template_kwargs", kwargs)):
                check_unicode(value, where)
            style = compiled.style
            if self._picture and not style.media:
                style = replace(style, mark=next(free_characters(messages, tools, kwargs)))
            prepared = prepare_messages(messages, style)
            marker = _mark_end(prepared, tools, kwargs) if continue_final_message else ""
            disguise = Disguise(tokenizer.special_pattern if tokenizer else None, prepared, tools, kwargs)
            values = {"messages": prepared, "tools": list(tools) if tools else None, **kwargs}
            context = {"documents": None, **self._special_tokens, **disguise.hide(values)}
            context["add_generation_prompt"] = add_generation_prompt
            text = self._run(compiled, context)
            text = text.replace(style.mark, self._picture) if style.mark else text
        except RecursionError:
            raise BadRequest("the messages or the tools are nested too deeply", param="messages") from None
        return (_cut_at(text, marker) if marker else text), disguise

    def _run(self, compiled: _Compiled, context: Mapping[str, Any]) -> str:
        try:
            return self._deadline.run(lambda: compiled.render(context))
        except TemplateRefusal as e:
            raise BadRequest(str(e) or "the model's chat template refuses these messages", param="messages") from e
        except DeadlineExceeded as e:
            reason = f"it took longer than {self._deadline_s:g} s"
            raise BadRequest(f"the model's chat template was stopped: {reason}", param="messages") from e
        except (TemplateLimit, MemoryError) as e:
            reason = str(e) or "out of memory"
            raise BadRequest(f"the model's chat template was stopped: {reason}", param="messages") from e
        except Exception as e:  # a template can raise anything
            reason = "it calls itself too deeply" if isinstance(e, RecursionError) else str(e)[:300]
            raise BadRequest(f"the model's chat template fails on these messages: {reason}", param="messages") from e


class _Compiled:
    """One template: compiled, with the names it uses and the form of messages that it expects."""

    def __init__(self, environment: ChatEnvironment, source: str, origin: str) -> None:
        if len(source) > _MAX_TEMPLATE_CHARS:
            raise ModelError(f"{origin} has {len(source)} characters; {_MAX_TEMPLATE_CHARS} are allowed")
        try:
            self._template, tree = environment.compile_source(source)
            self.names = frozenset(meta.find_undeclared_variables(tree))
        except jinja2.TemplateSyntaxError as e:
            raise ModelError(f"{origin} is not valid Jinja: line {e.lineno}: {e.message}", remedy=_OVERRIDE) from e
        except (jinja2.TemplateError, RecursionError, SyntaxError, MemoryError) as e:
            raise ModelError(f"{origin} can't be compiled: {e}", remedy=_OVERRIDE) from e
        self._environment = environment
        parts = _walks_over_content(tree)
        self.style = MessageStyle(
            parts=parts,
            media=parts and "image" in source,
            strings=re.search(r"\bis\s+(not\s+)?string\b", source) is not None,
            null_content="tool_calls" in source,
        )

    def render(self, context: Mapping[str, Any]) -> str:
        budget = Budget(context)
        self._environment.with_budget(budget)
        return render_parts(self._template, context, budget)


_OVERRIDE = "Give a working one with --chat-template FILE"
_PICTURES = MappingProxyType({"internvl": "<IMG_CONTEXT>", "idefics3": "<image>"})
"""By the projector of a GGUF file, whose template may be that of the language model."""


def load_chat_template(
    model_path: str, metadata: Mapping[str, Any], override: str | None = None
) -> ChatTemplate | None:
    """The model's chat template, None if it has none. `override` is a file, or the template itself."""
    if override is not None:
        source, tool_source, origin = _read_override(override), None, "the template given with --chat-template"
    else:
        named = _named_templates(Path(model_path), metadata)
        if "default" not in named:
            return None
        source, tool_source, origin = named["default"], named.get("tool_use"), "the model's chat template"
    tokens = special_tokens(model_path, metadata)
    picture = _PICTURES.get(str(metadata.get("clip.projector_type")), "")
    return ChatTemplate(source, tool_source=tool_source, special_tokens=tokens, origin=origin, picture=picture)


def _read_override(override: str) -> str:
    if "{{" in override or "{%" in override:
        return override
    text = read_text(Path(override))
    if text is None:
        raise ConfigError(
            f"there is no chat template file {override}", remedy="Give --chat-template a file, or the template itself"
        )
    return text


def _named_templates(directory: Path, metadata: Mapping[str, Any]) -> dict[str, str]:
    """All templates of the model by name; its own one is `default`."""
    if (text := read_text(directory / "chat_template.jinja")) is not None:
        tool_use = read_text(directory / "additional_chat_templates" / "tool_use.jinja")
        return {"default": text} | ({"tool_use": tool_use} if tool_use is not None else {})
    for name in ("tokenizer_config.json", "chat_template.json"):
        value = read_json(directory, name).get("chat_template")
        if isinstance(value, str):
            return {"default": value}
        if isinstance(value, list):
            items = [item for item in value if isinstance(item, dict)]
            return {str(item.get("name")): str(item.get("template", "")) for item in items}
    keys = {"default": "tokenizer.chat_template", "tool_use": "tokenizer.chat_template.tool_use"}
    return {name: metadata[key] for name, key in keys.items() if isinstance(metadata.get(key), str)}


def _check_kwargs(kwargs: Mapping[str, Any], names: frozenset[str]) -> dict[str, Any]:
    """Only what the template uses: a switch such as enable_thinking is harmless on a model that has none."""
    for name in kwargs:
        if name in _FORBIDDEN_KWARGS:
            raise BadRequest(f"chat_template_kwargs must not set {name}", param="chat_template_kwargs")
    return {name: value for name, value in kwargs.items() if name in names}


def _mark_end(messages: list[dict[str, Any]], *others: Any) -> str:
    """Put a character that occurs nowhere behind the last message's text, and return it."""
    last = messages[-1]
    content = last["content"]
    marker = next(free_characters(messages, *others))
    if isinstance(content, list) and content and "text" in content[-1]:
        last["content"] = [*content[:-1], content[-1] | {"text": content[-1]["text"] + marker}]
    elif isinstance(content, str) and content:
        last["content"] = content + marker
    else:
        raise BadRequest("continue_final_message needs a last message with text to go on from", param="messages")
    return marker


def _cut_at(text: str, marker: str) -> str:
    head, found, _ = text.rpartition(marker)
    if not found:
        raise BadRequest(
            "the model's chat template does not show the last message, so it can't be continued", param="messages"
        )
    return head


def _walks_over_content(tree: nodes.Template) -> bool:
    """Whether a template has a loop over a message's content, by itself or under a name that it or a macro gave it."""

    def is_content(node: nodes.Node | None) -> bool:
        if isinstance(node, nodes.Filter | nodes.Test):
            return is_content(node.node)
        if isinstance(node, nodes.Getattr):
            return node.attr == "content"
        if isinstance(node, nodes.Getitem):
            return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
        return isinstance(node, nodes.Name) and node.name in aliases

    aliases: set[str] = set()
    for assign in tree.find_all(nodes.Assign):
        if isinstance(assign.target, nodes.Name) and is_content(assign.node):
            aliases.add(assign.target.name)
    macros = {macro.name: macro.args for macro in tree.find_all(nodes.Macro)}
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Name):
            named = zip(call.args, macros.get(call.node.name, []), strict=False)
            aliases |= {parameter.name for given, parameter in named if is_content(given)}
    return any(is_content(loop.iter) for loop in tree.find_all(nodes.For))
