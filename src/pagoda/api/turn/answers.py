"""One answer of a chat as it comes: deltas and a message made of its reasoning, its content and its tool calls."""

from __future__ import annotations

import secrets
import string

from msgspec import UNSET

from pagoda.api.turn.message import ChatDelta, ChatMessage, Function, FunctionDelta, ToolCall, ToolCallDelta
from pagoda.text.parts import Part
from pagoda.text.reply import ReplyReader
from pagoda.types import Delta

ROLE = "assistant"
_LETTERS = string.ascii_letters + string.digits
_SHORT_ID_CHARS = 9


class Answer:
    """Reads one sequence. `parallel` False: only the first call counts. `short_ids`: as Mistral's templates want.

    `silent`: its reasoning is read and counted, but not told.
    """

    def __init__(
        self, reader: ReplyReader, *, parallel: bool = True, short_ids: bool = False, silent: bool = False
    ) -> None:
        self._reader = reader
        self._parallel = parallel
        self._short_ids = short_ids
        self._silent = silent
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[tuple[str, str, list[str]]] = []  # id, name, pieces of the arguments
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
        return [made for part in parts if (made := self._take(part)) is not None]

    def finish_reason(self, given: str) -> str:
        return "tool_calls" if given == "stop" and self._calls else given

    def message(self, prefix: str = "") -> ChatMessage:
        """All that was read so far."""
        content = prefix + "".join(self._content)
        reasoning = "".join(self._reasoning) or UNSET
        calls = [
            ToolCall(id=call_id, function=Function(name=name, arguments="".join(arguments)))
            for call_id, name, arguments in self._calls
        ]
        return ChatMessage(
            role=ROLE,
            content=content or (None if calls else ""),
            reasoning_content=reasoning,
            reasoning=reasoning,
            tool_calls=calls or UNSET,
        )

    def _take(self, part: Part) -> ChatDelta | None:
        if part.kind == "content":
            self._content.append(part.text)
            return ChatDelta(content=part.text)
        if part.kind == "reasoning" and self._silent:
            return None
        if part.kind == "reasoning":
            self._reasoning.append(part.text)
            return ChatDelta(reasoning_content=part.text, reasoning=part.text)
        if part.kind == "call":
            self._dropping = bool(self._calls) and not self._parallel
        if self._dropping:
            return None
        return ChatDelta(tool_calls=[self._begin(part.text) if part.kind == "call" else self._more(part.text)])

    def _begin(self, name: str) -> ToolCallDelta:
        call_id = f"call_{secrets.token_hex(12)}"
        if self._short_ids:
            call_id = "".join(secrets.choice(_LETTERS) for _ in range(_SHORT_ID_CHARS))
        self._calls.append((call_id, name, []))
        function = FunctionDelta(name=name, arguments="")
        return ToolCallDelta(index=len(self._calls) - 1, id=call_id, type="function", function=function)

    def _more(self, arguments: str) -> ToolCallDelta:
        self._calls[-1][2].append(arguments)
        return ToolCallDelta(index=len(self._calls) - 1, function=FunctionDelta(arguments=arguments))
