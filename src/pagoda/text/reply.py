"""An answer's text, read as its family writes it: reasoning, content, tool calls."""

from __future__ import annotations

from dataclasses import dataclass

from pagoda.text.harmony import MARKS, Harmony
from pagoda.text.parts import Part, join_parts
from pagoda.text.reasoning import HARMONY, ReasoningFormat, ThinkSplitter, find_reasoning
from pagoda.text.tool_parsers.scanner import CallScanner
from pagoda.text.tools import Schemas, ToolFormat, find_tool_format, is_harmony

TAIL_TOKENS = 64
"""How much of a prompt's end says whether its answer begins as reasoning."""


@dataclass(frozen=True, slots=True)
class ReplyFormat:
    """How a model writes its answers; None where it does not think, or its calls are unknown.

    `takes_tools`: its chat template has a place for them.
    """

    reasoning: ReasoningFormat | None
    tools: ToolFormat | None
    takes_tools: bool = True

    @property
    def is_harmony(self) -> bool:
        return self.reasoning is HARMONY or is_harmony(self.tools)

    def marks(self, *, tools: bool) -> tuple[str, ...]:
        """Texts of tokens that the reader must see, even if they are special."""
        if self.is_harmony:
            return MARKS
        reasoning = () if self.reasoning is None else self.reasoning.marks
        return (*reasoning, *(self.tools.marks if tools and self.tools is not None else ()))


class ReplyReader:
    """Reads one answer. `schemas`: the functions that it may call, None for none; `opened`: it begins as reasoning."""

    def __init__(self, form: ReplyFormat, *, schemas: Schemas | None = None, opened: bool = False) -> None:
        self._calls: CallScanner | None = None
        self._splitter: ThinkSplitter | Harmony | None = None
        if form.is_harmony:
            self._splitter = Harmony(tools=schemas is not None)
        else:
            if form.reasoning is not None:
                calls = () if form.tools is None else form.tools.marks
                self._splitter = ThinkSplitter(form.reasoning, opened=opened, calls=calls)
            if form.tools is not None and schemas is not None:
                self._calls = form.tools.scanner(schemas)

    @property
    def thinking(self) -> bool:
        return self._splitter is not None and self._splitter.thinking

    @property
    def settled(self) -> bool:
        """Whether all that follows is content, as it comes."""
        return self._calls is None and (self._splitter is None or self._splitter.settled)

    def feed(self, text: str) -> list[Part]:
        """The parts that are certain with this further text."""
        return join_parts(self._read(text))

    def finish(self) -> list[Part]:
        """The parts that were held back when the answer ended."""
        parts = self._through_calls([] if self._splitter is None else self._splitter.finish())
        return join_parts([*parts, *([] if self._calls is None else self._calls.finish())])

    def _read(self, text: str) -> list[Part]:
        if not text:
            return []
        return self._through_calls([Part("content", text)] if self._splitter is None else self._splitter.feed(text))

    def _through_calls(self, parts: list[Part]) -> list[Part]:
        if self._calls is None:
            return parts
        out: list[Part] = []
        for part in parts:
            out += self._calls.feed(part.text) if part.kind == "content" else [part]
        return out


def find_format(template: str, reasoning: str | None = None, tools: str | None = None) -> ReplyFormat:
    """By the chat template, unless parsers are named."""
    return ReplyFormat(find_reasoning(template, reasoning), find_tool_format(template, tools), "tools" in template)
