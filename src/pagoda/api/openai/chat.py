"""POST /v1/chat/completions: messages in, a message or a stream of its parts out."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from msgspec import UNSET, UnsetType
from starlette.requests import Request

from pagoda.api.http.body import parse, read_body
from pagoda.api.http.dialect import DONE, PLACE, TextEvent, event
from pagoda.api.http.stream import EventStream, Reply, answer
from pagoda.api.openai.replies import ChatChoice, ChatChunk, ChatChunkChoice, ChatReply
from pagoda.api.serving.generation import Gathered, Generation
from pagoda.api.serving.server import Server
from pagoda.api.serving.usage import Usage
from pagoda.api.turn.answers import ROLE, Answer
from pagoda.api.turn.bodies import ChatBody
from pagoda.api.turn.logprobs import ChatLogprobs, TokenNames, chat_logprobs, prompt_logprobs
from pagoda.api.turn.message import ChatDelta
from pagoda.api.turn.sampling import apply_options, sampling_params, take_headers
from pagoda.api.turn.turn import Turn, new_answer, prepare_turn, start_turn
from pagoda.types import Delta, TokenLogprob


async def chat_completions(server: Server, request: Request) -> Reply:
    body, ignored = parse(await read_body(request), ChatBody)
    chat = await start_chat(server, request, body)
    generation = chat.generation
    if body.stream:
        reply: Reply = EventStream(generation, chat.events(), server.aborted)
    else:
        reply = await answer(generation, chat.whole(), request.receive, server.aborted)
    server.dress(reply, [*ignored, *chat.ignored], generation)
    return reply


async def start_chat(server: Server, request: Request, body: ChatBody) -> ChatCall:
    """A call under way: its prompt made, its requests accepted."""
    take_headers(body, request.headers)
    apply_options(body, server.options)
    model = server.served.resolve(body.model)
    params = sampling_params(body, server.defaults(body.model), server.vocab_size, server.options.max_logprobs)
    turn = await prepare_turn(server, body)
    return ChatCall(server, body, turn, start_turn(server, "chatcmpl", turn, params, body, model=model))


class ChatCall:
    """Renders one call, whole or as a stream."""

    def __init__(self, server: Server, body: ChatBody, turn: Turn, generation: Generation) -> None:
        self._body = body
        self.generation = generation
        self.ignored = turn.ignored
        self._fingerprint = server.fingerprint
        self._names = TokenNames(server.tokenizer, body.return_tokens_as_token_ids)
        self._prefix = _echo(body)
        self._answers = [new_answer(server, turn, silent=not body.include_reasoning) for _ in generation.requests]
        options = body.stream_options
        running_usage = options is not None and options.continuous_usage_stats
        self._text_only = not (body.logprobs or body.return_token_ids or running_usage)
        self._texts: list[_Texts] = []
        self._waiting = [_Tokens() for _ in generation.requests]

    async def whole(self) -> ChatReply:
        generation = self.generation
        parts = await generation.gather(self._read)
        first = parts[0].prompt_logprobs
        return ChatReply(
            id=generation.id,
            created=generation.created,
            model=generation.model,
            choices=[self._choice(index, *both) for index, both in enumerate(zip(parts, self._answers, strict=True))],
            usage=generation.usage(),
            prompt_logprobs=None if first is None else prompt_logprobs(self._names, first),
            prompt_token_ids=self._prompt_ids() or None,
            system_fingerprint=self._fingerprint,
        )

    def _read(self, index: int, delta: Delta) -> list[ChatDelta]:
        answer = self._answers[index]
        before = answer.reasoning_tokens
        made = answer.read(delta)
        self.generation.reasoning_tokens += answer.reasoning_tokens - before
        return made

    def _choice(self, index: int, part: Gathered, said: Answer) -> ChatChoice:
        return ChatChoice(
            index=index,
            message=said.message(self._prefix),
            logprobs=chat_logprobs(self._names, part.logprobs) if self._body.logprobs else None,
            finish_reason=said.finish_reason(part.finish_reason),
            stop_reason=part.stop_reason,
            token_ids=part.token_ids if self._body.return_token_ids else None,
        )

    def _prompt_ids(self) -> list[int] | UnsetType:
        return self.generation.requests[0].prompt_token_ids if self._body.return_token_ids else UNSET

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Role, reasoning, content and calls, finish; usage if asked for; [DONE]."""
        options = self._body.stream_options
        for index in range(len(self.generation.requests)):
            yield event(self._chunk(index, ChatDelta(role=ROLE, content=""), prompt_token_ids=self._prompt_ids()))
            if self._prefix:
                yield event(self._chunk(index, ChatDelta(content=self._prefix)))
        if self._text_only:
            self._texts = [_Texts(self._chunk, index) for index in range(len(self._waiting))]
        async with aclosing(self.generation.rendered(self._render)) as rendered:
            async for data in rendered:
                yield data
        if options is not None and options.include_usage:
            yield event(self._bare([], self.generation.usage()))
        yield DONE

    def _render(self, index: int, delta: Delta) -> list[bytes]:
        """The events of one delta."""
        waiting = self._waiting[index]
        if not self._text_only:
            waiting.take(delta)
        events = []
        for made in self._read(index, delta):
            known = self._texts[index].event(made) if self._text_only else None
            events.append(known or event(self._chunk(index, made, *self._details(waiting))))
        if delta.finish_reason is not None:
            events.append(self._finish(index, delta, waiting))
        return events

    def _details(self, tokens: _Tokens) -> tuple[ChatLogprobs | None, list[int] | UnsetType]:
        """What is told of the tokens since the last chunk, as far as the client asked for it."""
        ids, logprobs = tokens.give()
        return (
            chat_logprobs(self._names, logprobs) if self._body.logprobs and ids else None,
            ids if self._body.return_token_ids and ids else UNSET,
        )

    def _finish(self, index: int, delta: Delta, tokens: _Tokens) -> bytes:
        logprobs, ids = self._details(tokens)
        choice = ChatChunkChoice(
            index=index,
            delta=ChatDelta(),
            logprobs=logprobs,
            finish_reason=self._answers[index].finish_reason(delta.finish_reason or "stop"),
            stop_reason=UNSET if delta.stop_reason is None else delta.stop_reason,
            token_ids=ids,
        )
        chunk = self._bare([choice], self._running_usage())
        chunk.system_fingerprint = self._fingerprint
        return event(chunk)

    def _chunk(
        self,
        index: int,
        delta: ChatDelta,
        logprobs: ChatLogprobs | None = None,
        token_ids: list[int] | UnsetType = UNSET,
        prompt_token_ids: list[int] | UnsetType = UNSET,
    ) -> ChatChunk:
        choice = ChatChunkChoice(index=index, delta=delta, logprobs=logprobs, token_ids=token_ids)
        return self._bare([choice], self._running_usage(), prompt_token_ids)

    def _running_usage(self) -> Usage | UnsetType:
        options = self._body.stream_options
        return self.generation.usage() if options is not None and options.continuous_usage_stats else UNSET

    def _bare(
        self,
        choices: list[ChatChunkChoice],
        usage: Usage | UnsetType,
        prompt_token_ids: list[int] | UnsetType = UNSET,
    ) -> ChatChunk:
        generation = self.generation
        return ChatChunk(
            id=generation.id,
            created=generation.created,
            model=generation.model,
            choices=choices,
            usage=usage,
            prompt_token_ids=prompt_token_ids,
        )


class _Texts:
    """The chunks of one sequence that hold a text and nothing else."""

    def __init__(self, chunk: Callable[[int, ChatDelta], ChatChunk], index: int) -> None:
        self._content = TextEvent(chunk(index, ChatDelta(content=PLACE)))
        self._reasoning = TextEvent(chunk(index, ChatDelta(reasoning_content=PLACE, reasoning=PLACE)))

    def event(self, made: ChatDelta) -> bytes | None:
        if made.content is not UNSET:
            return self._content(made.content)
        return None if made.reasoning is UNSET else self._reasoning(made.reasoning)


class _Tokens:
    """Tokens whose text is not out yet: they are told of with the next chunk."""

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []

    def take(self, delta: Delta) -> None:
        self._ids += delta.token_ids
        self._logprobs += delta.logprobs or []

    def give(self) -> tuple[list[int], list[TokenLogprob]]:
        given = self._ids, self._logprobs
        self._ids, self._logprobs = [], []
        return given


def _echo(body: ChatBody) -> str:
    """With `echo`, an answer that goes on behind an assistant's last message repeats that message."""
    last = body.messages[-1]
    content = last.get("content")
    if body.echo and last.get("role") == ROLE and isinstance(content, str):
        return content
    return ""
