"""A live request on the server's side: what is needed to go on with it, and what its consumer has not taken yet."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

import msgspec

from pagoda.types import Delta, Request


class Stream:
    """`tokens` are all output tokens so far; `strikes` the engine's deaths in flight since the last of them.

    A step depends on nothing but the request's own tokens, so a request that kills the engine does it again at the
    same place: one that got a token after a death is not the one.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.tokens = list(request.output_token_ids)
        self.arrival = -1
        self.wire_id: str | None = None
        self.strikes = 0
        self.lone_strikes = 0
        self.moved = False  # it got a token from this life of the engine
        self._untaken: Delta | None = None
        self._waiter: asyncio.Future[None] | None = None

    def resumed(self, wire_id: str) -> Request:
        """The request as the engine gets it, to go on behind the tokens that are here."""
        return msgspec.structs.replace(self.request, request_id=wire_id, output_token_ids=self.tokens)

    def put(self, delta: Delta) -> None:
        """Add what came. Deltas that the consumer was too slow to take become one, so memory grows with tokens only."""
        if delta.token_ids:
            self.tokens += delta.token_ids
            self.strikes = self.lone_strikes = 0
            self.moved = True
        delta.request_id = self.request.request_id
        self._untaken = delta if self._untaken is None else merge(self._untaken, delta)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> Delta:
        """The next delta, for the one consumer that a stream has."""
        while (delta := self._untaken) is None:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        self._untaken = None
        return delta


def merge(first: Delta, second: Delta) -> Delta:
    """One delta that says what two in a row say."""
    logprobs = (first.logprobs or []) + (second.logprobs or [])
    return Delta(
        request_id=first.request_id,
        token_ids=first.token_ids + second.token_ids,
        logprobs=None if first.logprobs is None and second.logprobs is None else logprobs,
        prompt_logprobs=second.prompt_logprobs if first.prompt_logprobs is None else first.prompt_logprobs,
        finish_reason=second.finish_reason,
        stop_reason=second.stop_reason,
        cached_tokens=first.cached_tokens or second.cached_tokens,
        error=second.error,
        text=first.text + second.text,
        pooled=second.pooled,
    )


class DeltaStream(AsyncGenerator[Delta, None]):
    """What `EngineClient.generate` gives. Closing it, cancelling its consumer or dropping it cancels the request.

    Not a generator function: the request is taken in, or refused, when it is made, and closing it works unstarted.
    """

    def __init__(self, stream: Stream, release: Callable[[Stream], None]) -> None:
        self._stream = stream
        self._release = release
        self._closed = False

    async def asend(self, value: None) -> Delta:
        if self._closed:
            raise StopAsyncIteration
        try:
            delta = await self._stream.take()
        except asyncio.CancelledError:
            self._close()
            raise
        if delta.finish_reason is not None:
            self._close()
        return delta

    async def athrow(self, *error: Any) -> Delta:
        self._close()
        return await super().athrow(*error)

    def __del__(self) -> None:
        self._close()

    def _close(self) -> None:
        if not self._closed:
            self._closed = True
            self._release(self._stream)
