"""POST /api/chat and /api/generate: Ollama's two ways to ask, whole or as lines of JSON."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import msgspec
from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from pagoda.api.http.body import parse, read_body
from pagoda.api.http.errors import JSON, to_json
from pagoda.api.http.stream import EventStream, Reply, answer
from pagoda.api.ollama.options import chat_body, ignored_options, params_of, resolve
from pagoda.api.ollama.protocol import (
    OLLAMA,
    OllamaCall,
    OllamaChatBody,
    OllamaChatReply,
    OllamaFunction,
    OllamaGenerateBody,
    OllamaGenerateReply,
    OllamaMessage,
    OllamaMetrics,
    OllamaToolCall,
    line,
    timestamp,
)
from pagoda.api.serving.generation import Generation
from pagoda.api.serving.server import Server
from pagoda.api.turn.answers import Answer
from pagoda.api.turn.logprobs import TokenNames, chat_logprobs
from pagoda.api.turn.message import ChatMessage, arguments_object
from pagoda.api.turn.structured import called, plain_grammar
from pagoda.api.turn.turn import Turn, new_answer, prepare_turn
from pagoda.errors import BadRequest
from pagoda.text.reply import ReplyFormat, ReplyReader
from pagoda.types import Delta, SamplingParams, TokenLogprob

Render = Callable[[str, OllamaMessage, bool], OllamaMetrics]
"""Model, message, done -> one reply: that is all in which the two routes' answers differ."""


async def chat(server: Server, request: Request) -> Reply:
    body, ignored = parse(await read_body(request), OllamaChatBody)
    resolve(server, body.model)
    if not body.messages:
        return _loaded(server, body, _chat_reply)
    asked = chat_body(server, body, body.messages, body.tools)
    asked.tool_choice = body.tool_choice
    params = params_of(server, asked)
    with called("format"):
        turn = await prepare_turn(server, asked)
    return await _generate(server, request, body, turn, params, ignored, _chat_reply)


async def generate(server: Server, request: Request) -> Reply:
    body, ignored = parse(await read_body(request), OllamaGenerateBody)
    resolve(server, body.model)
    _refuse(body)
    if not body.prompt:
        return _loaded(server, body, _generate_reply)
    system = body.system or server.derived.system(server.served.resolve(body.model))
    messages = [{"role": "system", "content": system}] if system else []
    if body.images and (body.raw or server.chat_template is None):
        raise BadRequest("images: a raw prompt has no places for pictures; leave raw out", param="images")
    asked = chat_body(server, body, [*messages, {"role": "user", "content": body.prompt, "images": body.images}])
    params = params_of(server, asked)
    if body.raw or server.chat_template is None:
        plain = body.prompt if body.raw or not system else f"{system}\n\n{body.prompt}"
        with called("format"):
            params = msgspec.structs.replace(params, grammar=await plain_grammar(server, asked))
        return await _generate(server, request, body, await server.encode(plain), params, ignored, _generate_reply)
    with called("format"):
        turn = await prepare_turn(server, asked)
    return await _generate(server, request, body, turn, params, ignored, _generate_reply)


def _refuse(body: OllamaGenerateBody) -> None:
    if body.suffix:
        raise BadRequest("suffix: filling in the middle is not supported by this server", param="suffix")
    if body.template:
        raise BadRequest(
            "template: a template may not come with a request",
            remedy="Start the server with --chat-template FILE",
            param="template",
        )
    if body.context:
        raise BadRequest("context: earlier turns go as messages to /api/chat", param="context")


def _chat_reply(model: str, message: OllamaMessage, done: bool) -> OllamaChatReply:
    return OllamaChatReply(model=model, created_at=timestamp(), message=message, done=done)


def _generate_reply(model: str, message: OllamaMessage, done: bool) -> OllamaGenerateReply:
    return OllamaGenerateReply(
        model=model, created_at=timestamp(), response=message.content, thinking=message.thinking, done=done
    )


def _loaded(server: Server, body: OllamaCall, render: Render) -> Response:
    """The answer to nothing. The model is here as long as the server is, whatever keep_alive says."""
    reply = render(body.model or server.names[0], OllamaMessage(content=""), True)
    reply.done_reason = "unload" if body.keep_alive == 0 else "load"
    return Response(line(reply), media_type=OLLAMA.media_type) if body.stream else _json(reply)


def _json(reply: msgspec.Struct) -> Response:
    return Response(to_json(reply), media_type=JSON)


async def _generate(
    server: Server,
    request: Request,
    body: OllamaCall,
    turn: Turn | list[int],
    params: SamplingParams,
    ignored: list[str],
    render: Render,
) -> Reply:
    """`turn` may be the bare ids of a prompt; then the answer is bare text too."""
    model = server.served.resolve(body.model)
    if isinstance(turn, Turn):
        generation = server.start(
            "ollama", [turn.prompt], turn.limit(params), images=[turn.images], model=model, shown=turn.shown
        )
        said = new_answer(server, turn)
        ignored = [*ignored, *turn.ignored]
    else:
        generation = server.start("ollama", [turn], params, model=model)
        said = Answer(ReplyReader(ReplyFormat(None, None)))
    answering = _Answering(server, body, generation, said, render)
    if body.stream:
        reply: Reply = EventStream(generation, answering.lines(), server.aborted, OLLAMA)
    else:
        reply = await answer(generation, answering.whole(), request.receive, server.aborted)
    server.dress(reply, [*ignored, *ignored_options(body)], generation)
    return reply


class _Answering:
    """Renders one call, whole or as a stream."""

    def __init__(self, server: Server, body: OllamaCall, generation: Generation, said: Answer, render: Render) -> None:
        self._model = body.model or generation.model
        self._wants_logprobs = body.logprobs or bool(body.top_logprobs)
        self._names = TokenNames(server.tokenizer)
        self._generation = generation
        self._said = said
        self._render = render
        self._logprobs: list[TokenLogprob] = []

    async def whole(self) -> OllamaMetrics:
        (gathered,) = await self._generation.gather(lambda _, delta: self._read(delta))
        said = self._said.message()
        thinking = said.reasoning_content
        message = OllamaMessage(content=said.content or "", thinking=thinking, tool_calls=_tool_calls(said))
        return self._last(message, gathered.finish_reason)

    async def lines(self) -> AsyncGenerator[bytes, None]:
        """A line for each piece of text, one with the calls, then one with the reason and the metrics."""
        async with aclosing(self._generation.rendered(self._lines)) as rendered:
            async for data in rendered:
                yield data

    def _lines(self, _: int, delta: Delta) -> list[bytes]:
        lines = [self._line(message) for message in self._read(delta)]
        if delta.finish_reason is not None:
            calls = _tool_calls(self._said.message())
            if calls is not UNSET:
                lines.append(self._line(OllamaMessage(content="", tool_calls=calls)))
            lines.append(line(self._last(OllamaMessage(content=""), delta.finish_reason)))
        return lines

    def _read(self, delta: Delta) -> list[OllamaMessage]:
        """The pieces of thinking and of text that this delta makes certain; calls are told whole, at the end."""
        self._logprobs += delta.logprobs or []
        made = self._said.read(delta)
        self._generation.reasoning_tokens = self._said.reasoning_tokens
        return [
            OllamaMessage(content=piece.content or "", thinking=piece.reasoning_content)
            for piece in made
            if piece.tool_calls is UNSET
        ]

    def _line(self, message: OllamaMessage) -> bytes:
        return line(self._with_logprobs(self._render(self._model, message, False)))

    def _with_logprobs(self, reply: OllamaMetrics) -> OllamaMetrics:
        """With those of the tokens that no line has told of so far."""
        if self._wants_logprobs:
            reply.logprobs = chat_logprobs(self._names, self._logprobs).content
            self._logprobs = []
        return reply

    def _last(self, message: OllamaMessage, finish_reason: str) -> OllamaMetrics:
        generation = self._generation
        total_s = time.monotonic() - generation.started
        first_s = total_s if generation.first_token_s is None else generation.first_token_s
        reply = self._with_logprobs(self._render(self._model, message, True))
        reply.done_reason = finish_reason
        reply.total_duration = _ns(total_s)
        reply.load_duration = 0
        reply.prompt_eval_count = generation.prompt_tokens
        reply.prompt_eval_duration = _ns(first_s)
        reply.eval_count = sum(generation.completion_tokens)
        reply.eval_duration = _ns(total_s - first_s)
        return reply


def _tool_calls(message: ChatMessage) -> list[OllamaToolCall] | UnsetType:
    if message.tool_calls is UNSET:
        return UNSET
    return [
        OllamaToolCall(
            id=call.id,
            function=OllamaFunction(index=index, name=call.name, arguments=arguments_object(call.text)),
        )
        for index, call in enumerate(message.tool_calls)
    ]


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
