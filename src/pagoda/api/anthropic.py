"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's way to ask, whole or as named events."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.requests import Request
from starlette.responses import Response

from pagoda.api.anthropic_prompt import chat_body, ignored_tools
from pagoda.api.anthropic_protocol import (
    ANTHROPIC,
    Block,
    BlockDelta,
    BlockStart,
    BlockStop,
    CountBody,
    CountReply,
    Ending,
    MessageDelta,
    MessagesBody,
    MessagesReply,
    MessageStart,
    MessageStop,
    MessagesUsage,
    TextBlock,
    TextDelta,
    named,
)
from pagoda.api.body import parse, read_body
from pagoda.api.dialect import DialectStream
from pagoda.api.generation import Gathered, Generation
from pagoda.api.messages import chat_prompt
from pagoda.api.replies import to_json
from pagoda.api.sampling import sampling_params
from pagoda.api.server import Server
from pagoda.api.shape import JSON
from pagoda.api.stream import Reply, answer
from pagoda.errors import ModelNotFound
from pagoda.types import Delta


async def messages(server: Server, request: Request) -> Reply:
    body, ignored = parse(await read_body(request), MessagesBody)
    model = _resolve(server, body)
    asked = chat_body(body)
    params = sampling_params(asked, server.default_params, server.vocab_size)
    generation = server.start("msg", [await chat_prompt(server, asked)], params, model=model)
    message = _Message(generation)
    if body.stream:
        reply: Reply = DialectStream(ANTHROPIC, generation, message.events(), server.aborted)
    else:
        reply = await answer(generation, message.whole(), request.receive, server.aborted)
    server.dress(reply, [*ignored, *ignored_tools(body)], generation)
    return reply


async def count_tokens(server: Server, request: Request) -> Response:
    body, ignored = parse(await read_body(request), CountBody)
    _resolve(server, body)
    prompt = await chat_prompt(server, chat_body(body))
    response = Response(to_json(CountReply(input_tokens=len(prompt))), media_type=JSON)
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

    def __init__(self, generation: Generation) -> None:
        self._generation = generation

    async def whole(self) -> MessagesReply:
        gathered = Gathered()
        async with aclosing(self._generation.deltas()) as deltas:
            async for _, delta in deltas:
                gathered.take(delta)
        ending = _ending(gathered.finish_reason, gathered.stop_reason)
        blocks: list[Block] = [TextBlock(text=gathered.text)] if gathered.text else []
        return self._reply(blocks, ending)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The message's start, its blocks one after the other, its end with the reason and what was used."""
        yield named(MessageStart(message=self._reply([], None)))
        begun = False
        async with aclosing(self._generation.deltas()) as deltas:
            async for _, delta in deltas:
                if delta.text and not begun:
                    begun = True
                    yield named(BlockStart(index=0, content_block=TextBlock(text="")))
                if delta.text:
                    yield named(BlockDelta(index=0, delta=TextDelta(text=delta.text)))
                if delta.finish_reason is not None:
                    if begun:
                        yield named(BlockStop(index=0))
                    yield self._end(delta)
        yield named(MessageStop())

    def _end(self, delta: Delta) -> bytes:
        ending = _ending(delta.finish_reason, delta.stop_reason)
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


def _ending(finish_reason: str | None, stop_reason: int | str | None) -> Ending:
    if finish_reason == "length":
        return Ending(stop_reason="max_tokens", stop_sequence=None)
    if isinstance(stop_reason, str):
        return Ending(stop_reason="stop_sequence", stop_sequence=stop_reason)
    return Ending(stop_reason="end_turn", stop_sequence=None)
