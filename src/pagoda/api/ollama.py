"""POST /api/chat and /api/generate: Ollama's two ways to ask, whole or as lines of JSON."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import msgspec
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from pagoda.api.body import parse, read_body
from pagoda.api.dialect import DialectStream
from pagoda.api.generation import Gathered, Generation
from pagoda.api.logprobs import TokenNames, chat_logprobs
from pagoda.api.messages import chat_prompt
from pagoda.api.ollama_options import chat_body, ignored_options, no_images, params_of, resolve
from pagoda.api.ollama_protocol import (
    OLLAMA,
    OllamaCall,
    OllamaChatBody,
    OllamaChatReply,
    OllamaGenerateBody,
    OllamaGenerateReply,
    OllamaMessage,
    OllamaMetrics,
    line,
    timestamp,
)
from pagoda.api.replies import ChatLogprob, to_json
from pagoda.api.server import Server
from pagoda.api.shape import JSON
from pagoda.api.stream import Reply, answer
from pagoda.errors import BadRequest
from pagoda.types import Delta, SamplingParams

Render = Callable[[str, str, str, bool], OllamaMetrics]
"""Model, time, text, done -> one reply: that is all in which the two routes' answers differ."""


async def chat(server: Server, request: Request) -> Reply:
    body, ignored = parse(await read_body(request), OllamaChatBody)
    resolve(server, body.model)
    if not body.messages:
        return _loaded(server, body, _chat_reply)
    asked = chat_body(server, body, body.messages, body.tools)
    params = params_of(server, asked)
    prompt = await chat_prompt(server, asked)
    return await _generate(server, request, body, prompt, params, ignored, _chat_reply)


async def generate(server: Server, request: Request) -> Reply:
    body, ignored = parse(await read_body(request), OllamaGenerateBody)
    resolve(server, body.model)
    _refuse(body)
    if not body.prompt:
        return _loaded(server, body, _generate_reply)
    messages = [{"role": "system", "content": body.system}] if body.system else []
    asked = chat_body(server, body, [*messages, {"role": "user", "content": body.prompt}])
    params = params_of(server, asked)
    if body.raw or server.chat_template is None:
        plain = body.prompt if body.raw or not body.system else f"{body.system}\n\n{body.prompt}"
        prompt = await server.encode(plain)
    else:
        prompt = await chat_prompt(server, asked)
    return await _generate(server, request, body, prompt, params, ignored, _generate_reply)


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
    if body.images:
        raise no_images()


def _chat_reply(model: str, moment: str, text: str, done: bool) -> OllamaChatReply:
    return OllamaChatReply(model=model, created_at=moment, message=OllamaMessage(content=text), done=done)


def _generate_reply(model: str, moment: str, text: str, done: bool) -> OllamaGenerateReply:
    return OllamaGenerateReply(model=model, created_at=moment, response=text, done=done)


def _loaded(server: Server, body: OllamaCall, render: Render) -> Response:
    """The answer to nothing. The model is here as long as the server is, whatever keep_alive says."""
    reply = render(body.model or server.names[0], timestamp(), "", True)
    reply.done_reason = "unload" if body.keep_alive == 0 else "load"
    return Response(line(reply), media_type=OLLAMA.media_type) if body.stream else _json(reply)


def _json(reply: msgspec.Struct) -> Response:
    return Response(to_json(reply), media_type=JSON)


async def _generate(
    server: Server,
    request: Request,
    body: OllamaCall,
    prompt: list[int],
    params: SamplingParams,
    ignored: list[str],
    render: Render,
) -> Reply:
    generation = server.start("ollama", [prompt], params, model=server.served.resolve(body.model))
    answering = _Answer(server, body, generation, render)
    if body.stream:
        reply: Reply = DialectStream(OLLAMA, generation, answering.lines(), server.aborted)
    else:
        reply = await answer(generation, answering.whole(), request.receive, server.aborted)
    server.dress(reply, [*ignored, *ignored_options(body)], generation)
    return reply


class _Answer:
    """Renders one call, whole or as a stream."""

    def __init__(self, server: Server, body: OllamaCall, generation: Generation, render: Render) -> None:
        self._model = body.model or generation.model
        self._wants_logprobs = body.logprobs or bool(body.top_logprobs)
        self._names = TokenNames(server.tokenizer)
        self._generation = generation
        self._render = render

    async def whole(self) -> OllamaMetrics:
        gathered = Gathered()
        async with aclosing(self._generation.deltas()) as deltas:
            async for _, delta in deltas:
                gathered.take(delta)
        reply = self._last(gathered.text, gathered.finish_reason)
        if self._wants_logprobs:
            reply.logprobs = chat_logprobs(self._names, gathered.logprobs).content
        return reply

    async def lines(self) -> AsyncGenerator[bytes, None]:
        """A line for each piece of text, then one with the reason and the metrics."""
        async with aclosing(self._generation.deltas()) as deltas:
            async for _, delta in deltas:
                if delta.text or (delta.token_ids and self._wants_logprobs):
                    reply = self._render(self._model, timestamp(), delta.text, False)
                    reply.logprobs = self._logprobs(delta) if self._wants_logprobs else UNSET
                    yield line(reply)
                if delta.finish_reason is not None:
                    yield line(self._last("", delta.finish_reason))

    def _logprobs(self, delta: Delta) -> list[ChatLogprob]:
        return chat_logprobs(self._names, delta.logprobs or []).content

    def _last(self, text: str, finish_reason: str) -> OllamaMetrics:
        generation = self._generation
        total_s = time.monotonic() - generation.started
        first_s = total_s if generation.first_token_s is None else generation.first_token_s
        reply = self._render(self._model, timestamp(), text, True)
        reply.done_reason = finish_reason
        reply.total_duration = _ns(total_s)
        reply.load_duration = 0
        reply.prompt_eval_count = generation.prompt_tokens
        reply.prompt_eval_duration = _ns(first_s)
        reply.eval_count = sum(generation.completion_tokens)
        reply.eval_duration = _ns(total_s - first_s)
        return reply


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
