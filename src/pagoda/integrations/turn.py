"""One turn of a chat with `LLM`: its prompt, the calls it may or must make, and its answer read part by part."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
from langchain_core.messages.tool import ToolCallChunk, tool_call_chunk

from pagoda.engine.llm import LLM
from pagoda.errors import BadRequest, EngineError
from pagoda.text.parts import Part
from pagoda.text.reply import TAIL_TOKENS, ReplyReader, find_format
from pagoda.text.reply_grammar import forced_calls, reply_grammar
from pagoda.text.tools import PLAIN_FORMAT, Schemas, function_schemas
from pagoda.types import SamplingParams


@dataclass(slots=True)
class Piece:
    """One part of an answer, or a piece of it; `usage` (tokens read and written) and the reason come with the last."""

    content: str = ""
    reasoning: str = ""
    call: ToolCallChunk | None = None
    finish_reason: str | None = None
    usage: tuple[int, int] | None = None


class Turn:
    """`tools` and `tool_choice` as OpenAI has them; `any` is `required`, and a bare name is that function's."""

    def __init__(
        self,
        llm: LLM,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        tool_choice: str | Mapping[str, Any] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self._llm = llm
        self._prompt = llm.chat_prompt(messages, tools=tools or None, chat_template_kwargs=template_kwargs)
        schemas = function_schemas(tools)
        forced = _forced(tool_choice, schemas)
        template, tokenizer = llm.chat_template, llm.tokenizer
        form = find_format("" if template is None else template.all_source)
        if forced is not None and form.tools is None:
            form = replace(form, tools=PLAIN_FORMAT)
        tail = tokenizer.decode(self._prompt.ids[-TAIL_TOKENS:], skip_special_tokens=False)
        opened = form.reasoning is not None and form.reasoning.is_open(tail)
        callable_ = schemas if schemas and tool_choice != "none" else None
        self._grammar = ""
        if forced is not None and form.tools is not None:
            calls = forced_calls(form.tools, forced, tokenizer, parallel=forced is schemas)
            self._grammar = reply_grammar(form, tokenizer, calls=calls, opened=opened)
        self._reader = ReplyReader(form, schemas=callable_, opened=opened)
        marks = form.marks(tools=callable_ is not None)
        self._shown = frozenset(i for i in tokenizer.special_ids if tokenizer.token_text(i) in marks)
        self._calls = -1

    def stream(self, params: SamplingParams) -> Iterator[Piece]:
        """Raises EngineError where the engine could not finish the answer."""
        if self._grammar:
            params = msgspec.structs.replace(params, grammar=self._grammar)
        written = 0
        for out in self._llm.stream(self._prompt, params, shown=self._shown):
            if out.error is not None:
                raise EngineError(out.error)
            written += len(out.token_ids)
            yield from map(self._piece, self._reader.feed(out.text))
            if out.finish_reason is not None:
                yield from map(self._piece, self._reader.finish())
                called = out.finish_reason == "stop" and self._calls >= 0
                reason = "tool_calls" if called else out.finish_reason
                yield Piece(finish_reason=reason, usage=(len(self._prompt.ids), written))

    def _piece(self, part: Part) -> Piece:
        if part.kind == "content":
            return Piece(content=part.text)
        if part.kind == "reasoning":
            return Piece(reasoning=part.text)
        if part.kind == "arguments":
            return Piece(call=tool_call_chunk(args=part.text, index=self._calls))
        self._calls += 1
        call_id = f"call_{secrets.token_hex(12)}"
        return Piece(call=tool_call_chunk(name=part.text, args="", id=call_id, index=self._calls))


def _forced(choice: str | Mapping[str, Any] | None, schemas: Schemas) -> Schemas | None:
    """The functions of which one must be called; None where the model decides."""
    if choice is None or choice in ("auto", "none"):
        return None
    if choice in ("any", "required") and schemas:
        return schemas
    function = choice.get("function") if isinstance(choice, Mapping) else {"name": choice}
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or name not in schemas:
        known = ", ".join(schemas) or "there are no tools"
        raise BadRequest(f"tool_choice {choice!r} names none of the tools: {known}", param="tool_choice")
    return {name: schemas[name]}
