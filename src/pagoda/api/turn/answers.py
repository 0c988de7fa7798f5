"""One answer of a chat as it comes: deltas and a message made of its reasoning, its content and its tool calls."""

from __future__ import annotations

import secrets
import string

from msgspec import UNSET

from pagoda.api.turn.custom import CustomInput
from pagoda.api.turn.message import (
    ChatDelta,
    ChatMessage,
    Custom,
    CustomDelta,
    Function,
    FunctionDelta,
    ToolCall,
    ToolCallDelta,
)
from pagoda.text.parts import Part
from pagoda.text.reply import ReplyReader
from pagoda.types import Delta

ROLE = "assistant"
_LETTERS = string.ascii_letters + string.digits
_SHORT_ID_CHARS = 9


class Answer:
    """Reads one sequence. `parallel` False: only the first call counts. `short_ids`: as Mistral's templates want.

    `silent`: its reasoning is read and counted, but not told. `custom`: the functions that stand for custom tools.
    """

    def __init__(
        self,
        reader: ReplyReader,
        *,
        parallel: bool = True,
        short_ids: bool = False,
        silent: bool = False,
        custom: frozenset[str] = frozenset(),
    ) -> None:
        self._reader = reader
        self._parallel = parallel
        self._short_ids = short_ids
        self._silent = silent
        self._custom = custom
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[tuple[str, str, list[str]]] = []  # id, name, pieces of the arguments or the input
        self._input: CustomInput | None = None  # of the last call, if it is a custom tool's
        self._dropping = False
        self._settled = False
        self.reasoning_tokens = 0

    def read(self, delta: Delta) -> list[ChatDelta]:
        """The deltas of the chat that this one makes certain: one kind of thing, and one call, in each."""
        if self._settled and delta.finish_reason is None:
            if not delta.text:
                return []
            self._content.append(delta.text)
            return [ChatDelta(content=delta.text)]
        thinking = self._reader.thinking
        parts = self._reader.feed(delta.text)
        if thinking or self._reader.thinking:
            self.reasoning_tokens += len(delta.token_ids)
        if delta.finish_reason is not None:
            parts += self._reader.finish()
        self._settled = self._reader.settled
        made = [each for part in parts for each in self._take(part)]
        return made if delta.finish_reason is None else [*made, *self._end_input()]

    def finish_reason(self, given: str) -> str:
        return "tool_calls" if given == "stop" and self._calls else given

    def message(self, prefix: str = "") -> ChatMessage:
        """All that was read so far."""
        content = prefix + "".join(self._content)
        reasoning = "".join(self._reasoning) or None
        calls = [self._call(call_id, name, "".join(pieces)) for call_id, name, pieces in self._calls]
        return ChatMessage(
            role=ROLE,
            content=content or (None if calls else ""),
            reasoning_content=reasoning or UNSET,
            reasoning=reasoning,
            tool_calls=calls or UNSET,
        )

    def _call(self, call_id: str, name: str, text: str) -> ToolCall:
        if name in self._custom:
            return ToolCall(id=call_id, type="custom", custom=Custom(name=name, input=text))
        return ToolCall(id=call_id, function=Function(name=name, arguments=text))

    def _take(self, part: Part) -> list[ChatDelta]:
        if part.kind == "content":
            self._content.append(part.text)
            return [ChatDelta(content=part.text)]
        if part.kind == "reasoning":
            if self._silent:
                return []
            self._reasoning.append(part.text)
            return [ChatDelta(reasoning_content=part.text, reasoning=part.text)]
        if part.kind == "call":
            self._dropping = bool(self._calls) and not self._parallel
            return [] if self._dropping else [*self._end_input(), self._begin(part.text)]
        return [] if self._dropping else self._more(part.text)

    def _begin(self, name: str) -> ChatDelta:
        call_id = f"call_{secrets.token_hex(12)}"
        if self._short_ids:
            call_id = "".join(secrets.choice(_LETTERS) for _ in range(_SHORT_ID_CHARS))
        self._calls.append((call_id, name, []))
        head = ToolCallDelta(index=len(self._calls) - 1, id=call_id)
        if name in self._custom:
            self._input = CustomInput()
            head.type, head.custom = "custom", CustomDelta(name=name, input="")
        else:
            head.type, head.function = "function", FunctionDelta(name=name, arguments="")
        return ChatDelta(tool_calls=[head])

    def _more(self, arguments: str) -> list[ChatDelta]:
        if self._input is not None:
            return self._more_input(self._input.feed(arguments))
        self._calls[-1][2].append(arguments)
        more = FunctionDelta(arguments=arguments)
        return [ChatDelta(tool_calls=[ToolCallDelta(index=len(self._calls) - 1, function=more)])]

    def _more_input(self, text: str) -> list[ChatDelta]:
        if not text:
            return []
        self._calls[-1][2].append(text)
        return [ChatDelta(tool_calls=[ToolCallDelta(index=len(self._calls) - 1, custom=CustomDelta(input=text))])]

    def _end_input(self) -> list[ChatDelta]:
        """What a custom tool's call still holds back when it is over."""
        ended, self._input = self._input, None
        return [] if ended is None else self._more_input(ended.finish())
