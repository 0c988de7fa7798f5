"""POST /v1/completions: text or token ids in, their continuation out."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import msgspec
from msgspec import UNSET, UnsetType
from starlette.requests import Request

from pagoda.api.http.body import parse, read_body
from pagoda.api.http.dialect import DONE, PLACE, TextEvent, event
from pagoda.api.http.stream import EventStream, Reply, answer
from pagoda.api.openai.replies import CompletionChoice, CompletionReply
from pagoda.api.serving.generation import Gathered, Generation
from pagoda.api.serving.server import Server
from pagoda.api.serving.usage import Usage
from pagoda.api.turn.bodies import CompletionBody
from pagoda.api.turn.logprobs import CompletionLogprobs, CompletionLogprobsBuilder, TokenNames, prompt_logprobs
from pagoda.api.turn.sampling import apply_options, beam_search, sampling_params, take_headers
from pagoda.api.turn.structured import plain_grammar
from pagoda.errors import BadRequest
from pagoda.types import Delta, SamplingParams, TokenLogprob


async def completions(server: Server, request: Request) -> Reply:
    body, ignored = parse(await read_body(request), CompletionBody)
    take_headers(body, request.headers)
    apply_options(body, server.options)
    model = server.served.resolve(body.model)
    params = _params(body, server)
    params = msgspec.structs.replace(params, grammar=await plain_grammar(server, body))
    given = _split(body.prompt)
    server.check_count(len(given) * params.n)
    cut = body.truncate_prompt_tokens, body.truncation_side
    prompts = [server.truncate(await _ids(server, body, one), *cut) for one in given]
    generation = server.start(
        "cmpl",
        prompts,
        params,
        model=model,
        cache_salt=body.cache_salt or "",
        priority=body.priority or 0,
        deadline_s=body.deadline_s,
        client_id=body.request_id,
        beams=beam_search(body, params),
    )
    completion = _Completion(server, body, generation, given)
    if body.stream:
        reply: Reply = EventStream(generation, completion.events(), server.aborted)
    else:
        reply = await answer(generation, completion.whole(), request.receive, server.aborted)
    many = body.best_of is not None and body.best_of != params.n  # as vLLM: all that is generated is returned
    server.dress(reply, [*ignored, *(["best_of"] if many else [])], generation)
    return reply


def _params(body: CompletionBody, server: Server) -> SamplingParams:
    params = sampling_params(body, server.defaults(body.model), server.vocab_size, server.options.max_logprobs)
    if body.echo and params.logprobs is not None:
        params = msgspec.structs.replace(params, prompt_logprobs=max(params.logprobs, params.prompt_logprobs or 0))
    return params


def _split(prompt: str | list[str | int | list[int]]) -> Sequence[str | list[int]]:
    """The single prompts: each a text or token ids."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise BadRequest("prompt must not be an empty list", param="prompt")
    ids = [item for item in prompt if isinstance(item, int)]
    if len(ids) == len(prompt):
        return [ids]
    prompts = [item for item in prompt if not isinstance(item, int)]
    if len(prompts) != len(prompt):
        raise BadRequest("prompt must not mix token ids with texts or lists", param="prompt")
    return prompts


async def _ids(server: Server, body: CompletionBody, prompt: str | list[int]) -> list[int]:
    if isinstance(prompt, str):
        whole = body.truncate_prompt_tokens is not None  # it may be as long as it likes
        encode = server.encode_whole if whole else server.encode
        return await encode(prompt, add_special_tokens=body.add_special_tokens)
    if any(not 0 <= token_id < server.vocab_size for token_id in prompt):
        raise BadRequest(f"prompt holds a token id outside 0..{server.vocab_size - 1}", param="prompt")
    return prompt


class _Completion:
    """Renders one call, whole or as a stream."""

    def __init__(
        self, server: Server, body: CompletionBody, generation: Generation, given: Sequence[str | list[int]]
    ) -> None:
        self._server = server
        self._body = body
        self._generation = generation
        self._given = given
        self._names = TokenNames(server.tokenizer, body.return_tokens_as_token_ids)
        # Scoring a prompt needs one step, and a step gives a token: with max_tokens 0 it is thrown away.
        self._silent = body.max_tokens == 0
        self._builders = [CompletionLogprobsBuilder(self._names) for _ in generation.requests]
        self._begun = [False] * len(generation.requests)
        self._text_events: list[TextEvent] = []  # one for each sequence, where nothing but texts is told

    async def whole(self) -> CompletionReply:
        parts = [Gathered() for _ in self._generation.requests]
        async with aclosing(self._generation.deltas()) as deltas:
            async for index, delta in deltas:
                parts[index].take(self._shown(index, delta))
        choices = [self._choice(index, part) for index, part in enumerate(parts)]
        reply = self._reply(choices, self._generation.usage())
        reply.service_tier = reply.kv_transfer_params = None
        reply.system_fingerprint = self._server.fingerprint
        return reply

    def _shown(self, index: int, delta: Delta) -> Delta:
        if not self._silent:
            return delta
        self._generation.completion_tokens[index] = 0
        logprobs: list[TokenLogprob] | None = None if delta.logprobs is None else []
        finish = None if delta.finish_reason is None else "length"
        return msgspec.structs.replace(
            delta, text="", token_ids=[], logprobs=logprobs, finish_reason=finish, stop_reason=None
        )

    def _choice(self, index: int, part: Gathered) -> CompletionChoice:
        prompt_ids = self._generation.requests[index].prompt_token_ids
        logprobs: CompletionLogprobs | None = None
        if self._body.logprobs is not None:
            echoed = self._echoed(index, part.prompt_logprobs)
            logprobs = self._builders[index].take([*echoed[0], *part.token_ids], [*echoed[1], *part.logprobs])
        wants_prompt = self._body.prompt_logprobs is not None and part.prompt_logprobs is not None
        return CompletionChoice(
            index=index,
            text=self._echo_text(index) + part.text,
            logprobs=logprobs,
            finish_reason=part.finish_reason,
            stop_reason=part.stop_reason,
            prompt_logprobs=prompt_logprobs(self._names, part.prompt_logprobs or []) if wants_prompt else None,
            token_ids=part.token_ids if self._body.return_token_ids else None,
            prompt_token_ids=prompt_ids if self._body.return_token_ids else None,
        )

    def _echoed(
        self, index: int, entries: list[TokenLogprob | None] | None
    ) -> tuple[Sequence[int], Sequence[TokenLogprob | None]]:
        if not self._body.echo or entries is None:
            return [], []
        return self._generation.requests[index].prompt_token_ids, entries

    def _echo_text(self, index: int) -> str:
        if not self._body.echo:
            return ""
        given = self._given[index // (self._body.n or 1)]
        if isinstance(given, str) and self._body.truncate_prompt_tokens is None:
            return given
        ids = self._generation.requests[index].prompt_token_ids
        return self._server.tokenizer.decode(ids, skip_special_tokens=self._body.skip_special_tokens)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The echo if asked for, text, finish; usage if asked for; [DONE]."""
        options = self._body.stream_options
        if not self._wants_tokens and self._running_usage() is UNSET:
            self._text_events = [self._text_event(index) for index in range(len(self._begun))]
        async with aclosing(self._generation.rendered(self._render)) as rendered:
            async for data in rendered:
                yield data
        if options is not None and options.include_usage:
            yield event(self._reply([], self._generation.usage()))
        yield DONE

    def _render(self, index: int, raw: Delta) -> list[bytes]:
        """The events of one delta."""
        delta = self._shown(index, raw)
        first = not self._begun[index] and bool(raw.token_ids)
        self._begun[index] |= first
        echo = self._echo_text(index) if first else ""
        events = []
        if self._text_events and not echo:
            if delta.text:
                events.append(self._text_events[index](delta.text))
        elif echo or delta.text or (delta.token_ids and self._wants_tokens):
            events.append(self._chunk(index, delta, echo, first))
        if delta.finish_reason is not None:
            events.append(self._finish(index, delta))
        return events

    def _text_event(self, index: int) -> TextEvent:
        choice = CompletionChoice(index=index, text=PLACE, logprobs=None, finish_reason=None)
        return TextEvent(self._reply([choice], UNSET))

    @property
    def _wants_tokens(self) -> bool:
        return self._body.logprobs is not None or self._body.return_token_ids

    def _chunk(self, index: int, delta: Delta, echo: str, first: bool) -> bytes:
        logprobs: CompletionLogprobs | None = None
        if self._body.logprobs is not None:
            ids, entries = self._echoed(index, delta.prompt_logprobs)
            logprobs = self._builders[index].take([*ids, *delta.token_ids], [*entries, *(delta.logprobs or [])])
        prompt_ids = self._generation.requests[index].prompt_token_ids
        choice = CompletionChoice(
            index=index,
            text=echo + delta.text,
            logprobs=logprobs,
            finish_reason=None,
            token_ids=delta.token_ids if self._body.return_token_ids else UNSET,
            prompt_token_ids=prompt_ids if self._body.return_token_ids and first else UNSET,
        )
        return event(self._reply([choice], self._running_usage()))

    def _finish(self, index: int, delta: Delta) -> bytes:
        stop_reason = UNSET if delta.stop_reason is None else delta.stop_reason
        choice = CompletionChoice(
            index=index, text="", logprobs=None, finish_reason=delta.finish_reason, stop_reason=stop_reason
        )
        reply = self._reply([choice], self._running_usage())
        reply.system_fingerprint = self._server.fingerprint
        return event(reply)

    def _running_usage(self) -> Usage | UnsetType:
        options = self._body.stream_options
        return self._generation.usage() if options is not None and options.continuous_usage_stats else UNSET

    def _reply(self, choices: list[CompletionChoice], usage: Usage | UnsetType) -> CompletionReply:
        generation = self._generation
        return CompletionReply(
            id=generation.id, created=generation.created, model=generation.model, choices=choices, usage=usage
        )
