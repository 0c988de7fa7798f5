"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's way to ask, whole or as named events."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from pagoda.api.anthropic.prompt import chat_body, ignored_tools
from pagoda.api.anthropic.protocol import (
    ANTHROPIC,
    Block,
    BlockDelta,
    BlockStart,
    BlockStop,
    CountBody,
    CountReply,
    Ending,
    InputDelta,
    MessageDelta,
    MessagesBody,
    MessagesReply,
    MessageStart,
    MessageStop,
    MessagesUsage,
    TextBlock,
    TextDelta,
    ThinkingBlock,
    ThinkingDelta,
    ToolUseBlock,
)
from pagoda.api.http.body import parse, read_body
from pagoda.api.http.dialect import named
from pagoda.api.http.errors import JSON, to_json
from pagoda.api.http.stream import EventStream, Reply, answer
from pagoda.api.serving.generation import Generation
from pagoda.api.serving.server import Server
from pagoda.api.turn.answers import Answer
from pagoda.api.turn.message import ChatDelta, ChatMessage, arguments_object
from pagoda.api.turn.sampling import sampling_params
from pagoda.api.turn.structured import called
from pagoda.api.turn.turn import new_answer, prepare_turn, start_turn
from pagoda.errors import ModelNotFound
from pagoda.types import Delta


async def messages(server: Server, request: Request) -> Reply:
    body, ignored = parse(await read_body(request), MessagesBody)
    model = _resolve(server, body)
    asked = chat_body(body)
    params = sampling_params(asked, server.defaults(asked.model), server.vocab_size)
    with called("output_config.format"):
        turn = await prepare_turn(server, asked)
    generation = start_turn(server, "msg", turn, params, asked, model=model)
    message = _Message(generation, new_answer(server, turn))
    if body.stream:
        reply: Reply = EventStream(generation, message.events(), server.aborted, ANTHROPIC)
    else:
        reply = await answer(generation, message.whole(), request.receive, server.aborted)
    server.dress(reply, [*ignored, *turn.ignored, *ignored_tools(body)], generation)
    return reply


async def count_tokens(server: Server, request: Request) -> Response:
    body, ignored = parse(await read_body(request), CountBody)
    _resolve(server, body)
    turn = await prepare_turn(server, chat_body(body))
    response = Response(to_json(CountReply(input_tokens=len(turn.prompt))), media_type=JSON)
    server.dress(response, [*ignored, *ignored_tools(body)])
    return response


def _resolve(server: Server, body: CountBody) -> str:
    try:
        return server.served.resolve(body.model)
    except ModelNotFound as error:
        remedy = (
            f"Agents ask for what ANTHROPIC_MODEL and ANTHROPIC_SMALL_FAST_MODEL say: set both to {server.names[0]}"
        )
        raise ModelNotFound(error.message, remedy=remedy, param="model") from None


class _Message:
    """Renders one call, whole or as a stream."""

    def __init__(self, generation: Generation, said: Answer) -> None:
        self._generation = generation
        self._said = said
        self._blocks = _Blocks()

    async def whole(self) -> MessagesReply:
        (gathered,) = await self._generation.gather(lambda _, delta: self._read(delta))
        ending = _ending(self._said.finish_reason(gathered.finish_reason), gathered.stop_reason)
        return self._reply(_whole_blocks(self._said.message()), ending)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The message's start, its blocks one after the other, its end with the reason and what was used."""
        yield named(MessageStart(message=self._reply([], None)))
        async with aclosing(self._generation.rendered(self._render)) as rendered:
            async for data in rendered:
                yield data
        yield named(MessageStop())

    def _render(self, _: int, delta: Delta) -> list[bytes]:
        events = [self._blocks.take(piece) for piece in self._read(delta)]
        if delta.finish_reason is not None:
            events.append(self._blocks.stop() + self._end(delta))
        return events

    def _read(self, delta: Delta) -> list[ChatDelta]:
        made = self._said.read(delta)
        self._generation.reasoning_tokens = self._said.reasoning_tokens
        return made

    def _end(self, delta: Delta) -> bytes:
        ending = _ending(self._said.finish_reason(delta.finish_reason or "stop"), delta.stop_reason)
        return named(MessageDelta(delta=ending, usage=self._usage()))

    def _reply(self, blocks: list[Block], ending: Ending | None) -> MessagesReply:
        return MessagesReply(
            id=self._generation.id.replace("-", "_"),
            model=self._generation.model,
            content=blocks,
            stop_reason=None if ending is None else ending.stop_reason,
            stop_sequence=None if ending is None else ending.stop_sequence,
            usage=self._usage(),
        )

    def _usage(self) -> MessagesUsage:
        generation = self._generation
        return MessagesUsage(
            input_tokens=generation.prompt_tokens - generation.cached_tokens,
            cache_read_input_tokens=generation.cached_tokens,
            output_tokens=sum(generation.completion_tokens),
        )


class _Blocks:
    """The events of a message's blocks: one is open at a time, and each call is a block of its own."""

    def __init__(self) -> None:
        self._index = -1
        self._open: type[Block] | None = None

    def take(self, piece: ChatDelta) -> bytes:
        if piece.tool_calls is not UNSET:
            call = piece.tool_calls[0]
            if call.id is UNSET:
                return self._delta(InputDelta(partial_json=call.text))
            return self._start(ToolUseBlock(id=call.id, name=call.name, input={}), again=True)
        if piece.reasoning_content is not UNSET:
            return self._start(ThinkingBlock(thinking="")) + self._delta(
                ThinkingDelta(thinking=piece.reasoning_content)
            )
        return self._start(TextBlock(text="")) + self._delta(TextDelta(text=piece.content or ""))

    def stop(self) -> bytes:
        """The end of the open block, if one is open."""
        if self._open is None:
            return b""
        self._open = None
        return named(BlockStop(index=self._index))

    def _start(self, block: Block, again: bool = False) -> bytes:
        if self._open is type(block) and not again:
            return b""
        ended = self.stop()
        self._index += 1
        self._open = type(block)
        return ended + named(BlockStart(index=self._index, content_block=block))

    def _delta(self, delta: TextDelta | ThinkingDelta | InputDelta) -> bytes:
        return named(BlockDelta(index=self._index, delta=delta))


def _whole_blocks(said: ChatMessage) -> list[Block]:
    blocks: list[Block] = []
    if said.reasoning_content:
        blocks.append(ThinkingBlock(thinking=said.reasoning_content))
    if said.content:
        blocks.append(TextBlock(text=said.content))
    if said.tool_calls:
        blocks += [
            ToolUseBlock(id=call.id, name=call.name, input=arguments_object(call.text)) for call in said.tool_calls
        ]
    return blocks


def _ending(finish_reason: str | None, stop_reason: int | str | None) -> Ending:
    if finish_reason == "tool_calls":
        return Ending(stop_reason="tool_use", stop_sequence=None)
    if finish_reason == "length":
        return Ending(stop_reason="max_tokens", stop_sequence=None)
    if isinstance(stop_reason, str):
        return Ending(stop_reason="stop_sequence", stop_sequence=stop_reason)
    return Ending(stop_reason="end_turn", stop_sequence=None)
