"""POST /v1/responses: items in, items out, whole, streamed or in the background."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message

from pagoda.api.http.body import parse, read_body
from pagoda.api.http.dialect import Dialect, named
from pagoda.api.http.errors import JSON, ErrorDetail, ErrorReply, error_reply, to_json
from pagoda.api.http.stream import EventStream, Reply, answer
from pagoda.api.responses.input import chat_body, given_items, ignored_parts
from pagoda.api.responses.output import Output
from pagoda.api.responses.protocol import (
    Completed,
    Created,
    Failed,
    Incomplete,
    IncompleteDetails,
    InProgress,
    InputDetails,
    OutputDetails,
    ResponseError,
    ResponseReply,
    ResponsesBody,
    ResponseUsage,
    StreamEvent,
)
from pagoda.api.responses.store import Stored
from pagoda.api.responses.tools import Tools, read_tools
from pagoda.api.serving.generation import Generation
from pagoda.api.serving.server import Server
from pagoda.api.turn.bodies import ChatBody
from pagoda.api.turn.logprobs import ChatLogprob, TokenNames, chat_logprobs
from pagoda.api.turn.sampling import sampling_params
from pagoda.api.turn.structured import called
from pagoda.api.turn.turn import Turn, new_answer, prepare_turn, start_turn
from pagoda.errors import ContextLengthExceeded, EngineError, PagodaError
from pagoda.types import Delta, TokenLogprob

log = logging.getLogger("pagoda.api")


async def responses(server: Server, request: Request) -> Reply:
    body, ignored = parse(await read_body(request), ResponsesBody)
    model = server.served.resolve(body.model)
    earlier = server.responses.get(body.previous_response_id).history() if body.previous_response_id else []
    items = [*earlier, *given_items(body)]
    tools = read_tools(body)
    asked = chat_body(body, items, tools)
    params = sampling_params(asked, server.defaults(asked.model), server.vocab_size)
    with called("text.format"):
        turn = await _turn(server, body, asked)
    generation = start_turn(server, "resp", turn, params, asked, model=model)
    reply = _new_reply(server, body, generation, params.temperature, params.top_p)
    stored = Stored(reply, items)
    response = _Response(server, body, tools, turn, generation, stored)
    if body.background:
        server.responses.put(stored)
        stored.task = asyncio.create_task(response.run())
        made: Reply = Response(to_json(reply), media_type=JSON)
    elif body.stream:
        dialect = Dialect(ErrorReply, response.failed, response.line)
        made = EventStream(generation, response.events(), server.aborted, dialect)
    else:
        made = await answer(generation, response.whole(), request.receive, server.aborted)
    server.dress(made, [*ignored, *turn.ignored, *ignored_parts(body, items, tools)], generation)
    return made


async def _turn(server: Server, body: ResponsesBody, asked: ChatBody) -> Turn:
    """The prompt. With truncation auto, as few of the oldest turns are left out as makes it fit."""
    if body.truncation == "disabled":
        return await prepare_turn(server, asked)
    first = [message for message in asked.messages if message["role"] in ("system", "developer")]
    rest = [message for message in asked.messages if message["role"] not in ("system", "developer")]

    async def fitting(start: int) -> Turn | None:
        try:
            turn = await prepare_turn(server, msgspec.structs.replace(asked, messages=[*first, *rest[start:]]))
        except ContextLengthExceeded:
            return None
        return turn if len(turn.prompt) < server.max_model_len else None

    best = await fitting(0)
    starts = [index for index, message in enumerate(rest) if index and message["role"] == "user"]
    while best is None and starts:
        # Fewer messages always take less room: half of what is left is decided with each try.
        middle = len(starts) // 2
        turn = await fitting(starts[middle])
        if turn is None:
            starts = starts[middle + 1 :]
        elif middle == 0:
            best = turn
        else:
            starts = starts[: middle + 1]
    return best or await prepare_turn(server, asked)


def _new_reply(
    server: Server, body: ResponsesBody, generation: Generation, temperature: float, top_p: float
) -> ResponseReply:
    return ResponseReply(
        id=generation.id.replace("-", "_"),
        created_at=generation.created,
        status="queued" if body.background else "in_progress",
        background=body.background,
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        max_tool_calls=body.max_tool_calls,
        metadata=body.metadata or {},
        model=generation.model,
        output=[],
        parallel_tool_calls=body.parallel_tool_calls,
        previous_response_id=body.previous_response_id,
        prompt_cache_key=body.prompt_cache_key,
        reasoning={"effort": None, "summary": None, **(body.reasoning or {})},
        safety_identifier=body.safety_identifier,
        service_tier="default",
        store=body.store,
        temperature=temperature,
        text={"format": {"type": "text"}, **(body.text or {})},
        tool_choice=body.tool_choice or "auto",
        tools=body.tools or [],
        top_logprobs=body.top_logprobs or 0,
        top_p=top_p,
        truncation=body.truncation,
        user=body.user,
    )


class _Response:
    """Renders one call: whole, as a stream of numbered events, or into the store."""

    def __init__(
        self, server: Server, body: ResponsesBody, tools: Tools, turn: Turn, generation: Generation, stored: Stored
    ) -> None:
        self._server = server
        self._generation = generation
        self._stored = stored
        self._reply = stored.reply
        self._said = new_answer(server, turn)
        asked = body.reasoning or {}
        summarized = bool(asked.get("summary") or asked.get("generate_summary"))
        self._output = Output(tools, summarized=summarized)
        self._names = TokenNames(server.tokenizer)
        self._waiting: list[TokenLogprob] = []
        self._events = 0

    async def whole(self) -> ResponseReply:
        async with aclosing(self._generation.deltas()) as deltas:
            async for _, delta in deltas:
                self._read(delta)
                self._reply.status = "in_progress"
                if delta.finish_reason is not None:
                    self._finish(delta)
        return self._reply

    async def run(self) -> None:
        """Answer in the background; how it ended is told in the stored response."""
        try:
            await answer(self._generation, self.whole(), _never, self._server.aborted)
        except asyncio.CancelledError:
            if self._reply.status in ("queued", "in_progress"):  # else it had just ended
                self._output.close("incomplete")
                self._end("cancelled")
        except PagodaError as error:
            self.failed(error_reply(error).error)
        except Exception:
            log.exception("request %s failed", self._generation.id)
            self.failed(error_reply(EngineError("the server failed on this request; its log says why")).error)
        self._server.responses.weigh(self._stored)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Created, in progress, items with their parts one after the other, and how it ended."""
        yield self.line(Created(response=self._reply))
        yield self.line(InProgress(response=self._reply))
        async with aclosing(self._generation.rendered(self._render)) as rendered:
            async for data in rendered:
                yield data
        ended = Completed if self._reply.status == "completed" else Incomplete
        yield self.line(ended(response=self._reply))

    def _render(self, _: int, delta: Delta) -> list[bytes]:
        events = self._read(delta)
        if delta.finish_reason is not None:
            events += self._finish(delta)
        return [self.line(each) for each in events]

    def line(self, told: msgspec.Struct) -> bytes:
        """An event with its number."""
        if isinstance(told, StreamEvent):
            told.sequence_number = self._events
            self._events += 1
        return named(told)

    def failed(self, detail: ErrorDetail) -> Failed:
        """The response with the error that ended it."""
        self._output.close("incomplete")
        self._end("failed")
        self._reply.error = ResponseError(code="server_error", message=detail.message)
        return Failed(response=self._reply)

    def _read(self, delta: Delta) -> list[StreamEvent]:
        pieces = self._said.read(delta)
        self._generation.reasoning_tokens = self._said.reasoning_tokens
        wanted = delta.logprobs is not None
        self._waiting += delta.logprobs or []
        events = []
        for piece in pieces:
            logprobs: list[ChatLogprob] | None = None
            if wanted:
                logprobs = chat_logprobs(self._names, self._waiting).content
                self._waiting = []
            events += self._output.take(piece, logprobs)
        return events

    def _finish(self, delta: Delta) -> list[StreamEvent]:
        """Close the last item, complete the response, and keep it if that is wanted."""
        cut = delta.finish_reason == "length"
        status: Literal["completed", "incomplete"] = "incomplete" if cut else "completed"
        events = self._output.close(status)
        if cut:
            self._reply.incomplete_details = IncompleteDetails()
        self._end(status)
        if self._reply.store and not self._reply.background:
            self._server.responses.put(self._stored)
        return events

    def _end(self, status: Literal["completed", "incomplete", "failed", "cancelled"]) -> None:
        self._reply.status = status
        self._reply.output = self._output.items
        self._reply.completed_at = int(time.time()) if status == "completed" else None
        self._reply.usage = self._usage()

    def _usage(self) -> ResponseUsage:
        usage = self._generation.usage()
        return ResponseUsage(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=InputDetails(cached_tokens=usage.prompt_tokens_details.cached_tokens),
            output_tokens=usage.completion_tokens,
            output_tokens_details=OutputDetails(reasoning_tokens=usage.completion_tokens_details.reasoning_tokens),
            total_tokens=usage.total_tokens,
        )


async def _never() -> Message:
    await asyncio.Event().wait()
    return {"type": "http.disconnect"}
