"""One admitted call: its sequences, their deltas with text, and the account of tokens and times."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

import msgspec

from pagoda.api.http.stream import Outlet
from pagoda.api.serving.engine import Deltas, Engine
from pagoda.api.serving.metrics import Metrics
from pagoda.api.serving.usage import CompletionTokensDetails, PromptTokensDetails, Usage
from pagoda.engine.stream import DeltaStream
from pagoda.errors import BadRequest, EngineError, PagodaError
from pagoda.sched.outcome import GRAMMAR_ENDED
from pagoda.text.output import TextOutput
from pagoda.text.reasoning import ReasoningFormat
from pagoda.text.tokenizer import Tokenizer
from pagoda.types import Delta, Request, TokenLogprob

Render = Callable[[int, Delta], Sequence[bytes]]
"""The parts of a streamed answer that a delta of a sequence makes."""


@dataclass(frozen=True, slots=True)
class ThinkingLimit:
    """The reasoning ends after `tokens` at the latest, if need be with `closing`. `opened`: the prompt began it."""

    tokens: int
    form: ReasoningFormat
    closing: list[int]
    opened: bool


class Owner(Protocol):
    """Who admitted a call: what it is made with, and who is told when it is over, with its HTTP status."""

    @property
    def engine(self) -> Engine: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def metrics(self) -> Metrics: ...
    def release(self, generation: Generation, status: int) -> None: ...


class Generation:
    """Yields (index, delta) of all sequences; sequence `i` of prompt `p` has the index `p * n + i`.

    The special tokens in `shown` are part of the text. Whoever reads the text counts `reasoning_tokens`.
    """

    def __init__(
        self,
        owner: Owner,
        id: str,
        model: str,
        requests: Sequence[Request],
        n: int,
        shown: frozenset[int] = frozenset(),
        deadline_s: float | None = None,
        thinking: ThinkingLimit | None = None,
    ) -> None:
        self.id = id
        self._thinking = thinking
        self.deadline_s = deadline_s
        self.outlet: Outlet | None = None
        self.model = model
        self.created = int(time.time())
        self.requests = requests
        self.prompt_tokens = sum(len(request.prompt_token_ids) for request in requests[::n])
        self.images_bytes = sum(len(image.pixels) for request in requests[::n] for image in request.images)
        self.sequence_prompt_tokens = self.prompt_tokens * n
        self.completion_tokens = [0] * len(requests)
        self.reasoning_tokens = 0
        self.finish_reasons: list[str | None] = [None] * len(requests)
        self.started = time.monotonic()
        self.first_token_s: float | None = None
        self._cached_tokens = [0] * len(requests)
        self._last_token = [0.0] * len(requests)
        self._owner = owner
        self._n = n
        self._shown = shown
        self._closed = False

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that were in the cache; only the first sequence of a prompt tells what this call found."""
        return sum(self._cached_tokens[:: self._n])

    @property
    def time_left_s(self) -> float | None:
        """Until the client's deadline; None if it gave none."""
        return None if self.deadline_s is None else max(0.0, self.started + self.deadline_s - time.monotonic())

    def usage(self) -> Usage:
        completion_tokens = sum(self.completion_tokens)
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=self.prompt_tokens + completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=self.cached_tokens),
            completion_tokens_details=CompletionTokensDetails(reasoning_tokens=self.reasoning_tokens),
        )

    def deltas(self) -> AsyncGenerator[tuple[int, Delta], None]:
        """All deltas as they come. Raises a PagodaError when a sequence failed; closing it cancels all sequences."""
        return self._sequence(0) if len(self.requests) == 1 else self._all_sequences()

    async def gather(self, read: Callable[[int, Delta], object]) -> list[Gathered]:
        """All that each sequence gave, for a reply that is sent whole; `read` sees each delta as it comes."""
        parts = [Gathered() for _ in self.requests]
        async with aclosing(self.deltas()) as deltas:
            async for index, delta in deltas:
                parts[index].take(delta)
                read(index, delta)
        return parts

    async def rendered(self, render: Render) -> AsyncGenerator[bytes, None]:
        """What `render` makes of each delta, in order.

        While nobody has to wait for the client, and the engine not for us, it goes to the outlet where the delta comes:
        that takes half the time of a way through a task and the generators above it.
        """
        deltas = self._sequence(0, render) if len(self.requests) == 1 else self._all_sequences()
        async with aclosing(deltas):
            async for index, delta in deltas:
                for data in render(index, delta):
                    yield data

    def _reader(self, index: int, output: TextOutput, render: Render, outlet: Outlet) -> Callable[[Delta], bool]:
        def read(raw: Delta) -> bool:
            if not outlet.ready:
                return False
            delta = output.feed(raw)
            self._account(index, delta)
            for data in render(index, delta):
                outlet.send(data)
            return True

        return read

    async def _all_sequences(self) -> AsyncGenerator[tuple[int, Delta], None]:
        queue: asyncio.Queue[tuple[int, Delta | Exception | None]] = asyncio.Queue()
        tasks = [asyncio.create_task(self._pump(index, queue)) for index in range(len(self.requests))]
        try:
            open_sequences = len(tasks)
            while open_sequences:
                index, item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    open_sequences -= 1
                else:
                    yield index, item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _pump(self, index: int, queue: asyncio.Queue[tuple[int, Delta | Exception | None]]) -> None:
        try:
            async with aclosing(self._sequence(index)) as deltas:
                async for item in deltas:
                    queue.put_nowait(item)
            queue.put_nowait((index, None))
        except Exception as error:
            queue.put_nowait((index, error))

    async def _sequence(self, index: int, render: Render | None = None) -> AsyncGenerator[tuple[int, Delta], None]:
        request = self.requests[index]
        output = TextOutput(self._owner.tokenizer, request, self._shown)
        deltas = self._owner.engine.generate(request) if self._thinking is None else self._limited(index)
        if render is not None and self.outlet is not None and isinstance(deltas, DeltaStream) and not output.cuts:
            deltas.read_by(self._reader(index, output, render, self.outlet))
        async with aclosing(deltas) as stream:
            async for raw in stream:
                delta = output.feed(raw)
                self._account(index, delta)
                if delta.finish_reason == "error":
                    raise _failure(delta.error)
                if delta.finish_reason == "abort":
                    raise EngineError("the request was cancelled by the server")
                yield index, delta
                if delta.finish_reason is not None:
                    return
        raise EngineError("the engine ended this request without a reason")

    async def _limited(self, index: int) -> AsyncGenerator[Delta, None]:
        """Deltas of a sequence whose reasoning has a limit: it is run up to there, and goes on behind its end.

        The limit is a number of tokens, so the answer is the same however they arrive.
        """
        request, limit = self.requests[index], self._thinking
        most = request.params.max_tokens
        if limit is None or most is None or limit.tokens >= most:
            async with aclosing(self._owner.engine.generate(request)) as stream:
                async for raw in stream:
                    yield raw
            return
        known: list[int] = []
        params = msgspec.structs.replace(request.params, max_tokens=limit.tokens)
        async with aclosing(self._owner.engine.generate(msgspec.structs.replace(request, params=params))) as stream:
            async for raw in stream:
                known += raw.token_ids
                if raw.finish_reason != "length":
                    yield raw
                    if raw.finish_reason is not None:
                        return
                    continue
                yield msgspec.structs.replace(raw, finish_reason=None)
        text = self._owner.tokenizer.decode(known, skip_special_tokens=False)
        if limit.form.goes_on_in(text, opened=limit.opened):
            closing = limit.closing[: most - len(known)]
            known += closing
            yield self._forced(request, closing, over=len(known) == most)
            if len(known) == most:
                return
        rest = msgspec.structs.replace(request, request_id=request.request_id + "-on", output_token_ids=known)
        async with aclosing(self._owner.engine.generate(rest)) as stream:
            async for raw in stream:
                # What is in the cache now is this call's own.
                yield msgspec.structs.replace(raw, request_id=request.request_id, cached_tokens=0)

    def _forced(self, request: Request, tokens: list[int], *, over: bool) -> Delta:
        """Tokens that nobody had to choose."""
        wanted = request.params.logprobs is not None
        return Delta(
            request_id=request.request_id,
            token_ids=tokens,
            logprobs=[TokenLogprob(token, 0.0, []) for token in tokens] if wanted else None,
            finish_reason="length" if over else None,
        )

    def _account(self, index: int, delta: Delta) -> None:
        if delta.cached_tokens:
            self._cached_tokens[index] = max(self._cached_tokens[index], delta.cached_tokens)
        if count := len(delta.token_ids):
            now, before = time.monotonic(), self._last_token[index]
            if before:
                self._owner.metrics.next_tokens((now - before) / count, count)
            else:
                self._owner.metrics.first_token(now - self.started)
            self._last_token[index] = now
            self.completion_tokens[index] += count
            if self.first_token_s is None:
                self.first_token_s = now - self.started
        if delta.finish_reason is not None:
            self.finish_reasons[index] = delta.finish_reason

    def close(self, status: int = 200) -> None:
        """Give back what admission took, count and log. Safe to call twice; the first status counts."""
        if self._closed:
            return
        self._closed = True
        self._owner.release(self, status)


def _failure(told: str | None) -> PagodaError:
    """What ended a sequence. A grammar that is too complex is the client's own, and fails again if it is sent again."""
    if told is not None and told.startswith(GRAMMAR_ENDED):
        return BadRequest(told)
    return EngineError(told or "the engine could not finish this request")


class Pooled(Generation):
    """One admitted call of a pooled model: each sequence gives one vector and ends."""

    async def vectors(self) -> list[bytes]:
        """What each sequence gave, float32 bytes. Raises EngineError when one failed; leaving cancels all of them."""
        streams = [self._owner.engine.generate(request) for request in self.requests]
        try:
            return [await self._vector(index, stream) for index, stream in enumerate(streams)]
        finally:
            for stream in streams:
                await stream.aclose()

    async def _vector(self, index: int, stream: Deltas) -> bytes:
        async for delta in stream:
            self._account(index, delta)
            if delta.pooled is not None:
                return delta.pooled
            if delta.finish_reason is not None:
                raise EngineError(delta.error or "the engine could not finish this request")
        raise EngineError("the engine ended this request without a reason")


class Gathered:
    """What one sequence has given so far, for a reply that is sent whole."""

    def __init__(self) -> None:
        self.text = ""
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: list[TokenLogprob | None] | None = None
        self.finish_reason = "stop"
        self.stop_reason: int | str | None = None

    def take(self, delta: Delta) -> None:
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs or []
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason
            self.stop_reason = delta.stop_reason
