"""The output of one response as it grows: finished items, and the events that tell of them."""

from __future__ import annotations

import secrets
from typing import Literal

from msgspec import UNSET

from pagoda.api.responses.protocol import (
    ArgumentsDelta,
    ArgumentsDone,
    CallItem,
    ContentPart,
    Item,
    ItemAdded,
    ItemDone,
    ItemStatus,
    MessageItem,
    OutputText,
    PartAdded,
    PartDone,
    ReasoningDelta,
    ReasoningDone,
    ReasoningItem,
    ReasoningText,
    StreamEvent,
    TextDelta,
    TextDone,
)
from pagoda.api.turn.logprobs import ChatLogprob
from pagoda.api.turn.message import ChatDelta

_Kind = Literal["message", "reasoning", "call"]
_PREFIX = {"message": "msg", "reasoning": "rs", "call": "fc"}


def new_id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(16)}"


class Output:
    """Takes an answer's pieces. One item is open at a time; those in `items` are done."""

    def __init__(self) -> None:
        self.items: list[Item] = []
        self._kind: _Kind | None = None
        self._id = self._call_id = self._name = ""
        self._texts: list[str] = []
        self._logprobs: list[ChatLogprob] | None = None

    def take(self, piece: ChatDelta, logprobs: list[ChatLogprob] | None) -> list[StreamEvent]:
        """The events of one piece; `logprobs` are those of its tokens, None if they are not wanted."""
        if piece.tool_calls is not UNSET:
            call = piece.tool_calls[0]
            if call.id is UNSET:
                return self._more_arguments(call.function.arguments)
            events = self.close()
            self._call_id, self._name = call.id, call.function.name or ""
            return [*events, *self._open("call")]
        if piece.reasoning_content is not UNSET:
            events = self._open("reasoning")
            self._texts.append(piece.reasoning_content)
            delta: StreamEvent = ReasoningDelta(
                output_index=len(self.items), item_id=self._id, delta=piece.reasoning_content
            )
            return [*events, delta]
        events = self._open("message")
        text = piece.content or ""
        self._texts.append(text)
        if logprobs is not None:
            self._logprobs = [*(self._logprobs or []), *logprobs]
        delta = TextDelta(output_index=len(self.items), item_id=self._id, delta=text, logprobs=logprobs or [])
        return [*events, delta]

    def close(self, status: ItemStatus = "completed") -> list[StreamEvent]:
        """The open item is done."""
        if self._kind is None:
            return []
        item = self._item(status)
        index, item_id, text = len(self.items), self._id, "".join(self._texts)
        events: list[StreamEvent] = []
        if isinstance(item, CallItem):
            events.append(ArgumentsDone(output_index=index, item_id=item_id, arguments=text, name=item.name))
        else:
            if isinstance(item, MessageItem):
                events.append(TextDone(output_index=index, item_id=item_id, text=text, logprobs=self._logprobs or []))
            else:
                events.append(ReasoningDone(output_index=index, item_id=item_id, text=text))
            events.append(PartDone(output_index=index, item_id=item_id, part=item.content[0]))
        self.items.append(item)
        self._kind, self._texts, self._logprobs = None, [], None
        return [*events, ItemDone(output_index=index, item=item)]

    def _more_arguments(self, arguments: str) -> list[StreamEvent]:
        self._texts.append(arguments)
        return [ArgumentsDelta(output_index=len(self.items), item_id=self._id, delta=arguments)]

    def _open(self, kind: _Kind) -> list[StreamEvent]:
        if self._kind == kind:
            return []
        events = self.close()
        self._kind, self._id = kind, new_id(_PREFIX[kind])
        index = len(self.items)
        if kind == "call":
            return [*events, ItemAdded(output_index=index, item=self._item("in_progress"))]
        part: ContentPart = OutputText(text="") if kind == "message" else ReasoningText(text="")
        item: Item = (
            MessageItem(id=self._id, status="in_progress", content=[])
            if kind == "message"
            else ReasoningItem(id=self._id, status="in_progress", content=[])
        )
        added = PartAdded(output_index=index, item_id=self._id, part=part)
        return [*events, ItemAdded(output_index=index, item=item), added]

    def _item(self, status: ItemStatus) -> Item:
        text = "".join(self._texts)
        if self._kind == "call":
            return CallItem(id=self._id, call_id=self._call_id, name=self._name, arguments=text, status=status)
        if self._kind == "reasoning":
            return ReasoningItem(id=self._id, status=status, content=[ReasoningText(text=text)])
        logprobs = UNSET if self._logprobs is None else self._logprobs
        return MessageItem(id=self._id, status=status, content=[OutputText(text=text, logprobs=logprobs)])
