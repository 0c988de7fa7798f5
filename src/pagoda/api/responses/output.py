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
    CustomCallItem,
    CustomInputDelta,
    CustomInputDone,
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
    SummaryAdded,
    SummaryDelta,
    SummaryDone,
    SummaryText,
    SummaryTextDone,
    TextDelta,
    TextDone,
)
from pagoda.api.responses.tools import Tool, Tools
from pagoda.api.turn.logprobs import ChatLogprob
from pagoda.api.turn.message import ChatDelta

_Kind = Literal["message", "reasoning", "call"]
_PREFIX = {"message": "msg", "reasoning": "rs", "call": "fc"}


def new_id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(16)}"


class Output:
    """Takes an answer's pieces. One item is open at a time; those in `items` are done.

    `tools` tells what the called functions stand for. `summarized`: reasoning goes out as its own summary.
    """

    def __init__(self, tools: Tools, *, summarized: bool = False) -> None:
        self.items: list[Item] = []
        self._tools = tools
        self._summarized = summarized
        self._kind: _Kind | None = None
        self._id = self._call_id = ""
        self._tool = Tool("")
        self._custom = False
        self._texts: list[str] = []
        self._logprobs: list[ChatLogprob] | None = None

    def take(self, piece: ChatDelta, logprobs: list[ChatLogprob] | None) -> list[StreamEvent]:
        """The events of one piece; `logprobs` are those of its tokens, None if they are not wanted."""
        if piece.tool_calls is not UNSET:
            call = piece.tool_calls[0]
            if call.id is UNSET:
                return self._more_arguments(call.text)
            events = self.close()
            self._call_id, self._tool, self._custom = call.id, self._tools.tool(call.name), call.type == "custom"
            return [*events, *self._open("call")]
        if piece.reasoning_content is not UNSET:
            events = self._open("reasoning")
            self._texts.append(piece.reasoning_content)
            kind = SummaryDelta if self._summarized else ReasoningDelta
            return [*events, kind(output_index=len(self.items), item_id=self._id, delta=piece.reasoning_content)]
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
        index = len(self.items)
        events = self._done(item, index)
        self.items.append(item)
        self._kind, self._texts, self._logprobs = None, [], None
        return [*events, ItemDone(output_index=index, item=item)]

    def _done(self, item: Item, index: int) -> list[StreamEvent]:
        """What tells that the text of an item is whole."""
        text, item_id = "".join(self._texts), self._id
        if isinstance(item, CallItem):
            return [ArgumentsDone(output_index=index, item_id=item_id, arguments=text, name=item.name)]
        if isinstance(item, CustomCallItem):
            return [CustomInputDone(output_index=index, item_id=item_id, input=text)]
        if isinstance(item, MessageItem):
            done: StreamEvent = TextDone(output_index=index, item_id=item_id, text=text, logprobs=self._logprobs or [])
            return [done, PartDone(output_index=index, item_id=item_id, part=item.content[0])]
        if self._summarized:
            done = SummaryTextDone(output_index=index, item_id=item_id, text=text)
            return [done, SummaryDone(output_index=index, item_id=item_id, part=item.summary[0])]
        done = ReasoningDone(output_index=index, item_id=item_id, text=text)
        return [done, PartDone(output_index=index, item_id=item_id, part=item.content[0])]

    def _more_arguments(self, text: str) -> list[StreamEvent]:
        self._texts.append(text)
        kind = CustomInputDelta if self._custom else ArgumentsDelta
        return [kind(output_index=len(self.items), item_id=self._id, delta=text)]

    def _open(self, kind: _Kind) -> list[StreamEvent]:
        if self._kind == kind:
            return []
        events = self.close()
        self._kind, self._id = kind, new_id("ctc" if kind == "call" and self._custom else _PREFIX[kind])
        index = len(self.items)
        if kind == "call":
            return [*events, ItemAdded(output_index=index, item=self._item("in_progress"))]
        if kind == "reasoning" and self._summarized:
            empty = ReasoningItem(id=self._id, status="in_progress")
            begun = SummaryAdded(output_index=index, item_id=self._id, part=SummaryText(text=""))
            return [*events, ItemAdded(output_index=index, item=empty), begun]
        part: ContentPart = OutputText(text="") if kind == "message" else ReasoningText(text="")
        item: Item = (
            MessageItem(id=self._id, status="in_progress", content=[])
            if kind == "message"
            else ReasoningItem(id=self._id, status="in_progress")
        )
        added = PartAdded(output_index=index, item_id=self._id, part=part)
        return [*events, ItemAdded(output_index=index, item=item), added]

    def _item(self, status: ItemStatus) -> Item:
        text = "".join(self._texts)
        if self._kind == "call":
            name, namespace = self._tool.name, UNSET if self._tool.namespace is None else self._tool.namespace
            if self._custom:
                return CustomCallItem(
                    id=self._id, call_id=self._call_id, name=name, input=text, namespace=namespace, status=status
                )
            return CallItem(
                id=self._id, call_id=self._call_id, name=name, arguments=text, namespace=namespace, status=status
            )
        if self._kind == "reasoning":
            if self._summarized:
                return ReasoningItem(id=self._id, status=status, summary=[SummaryText(text=text)])
            return ReasoningItem(id=self._id, status=status, content=[ReasoningText(text=text)])
        logprobs = UNSET if self._logprobs is None else self._logprobs
        return MessageItem(id=self._id, status=status, content=[OutputText(text=text, logprobs=logprobs)])
