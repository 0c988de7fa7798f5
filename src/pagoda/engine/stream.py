"""A live request on the server's side: what is needed to go on with it, and what its consumer has not taken yet."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import msgspec

from pagoda.types import Delta, Request

_MOST_UNTAKEN = 256


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
        self.reader: Callable[[Delta], bool] | None = None
        self._untaken: list[Delta] = []
        self._waiter: asyncio.Future[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def resumed(self, wire_id: str) -> Request:
        """The request as the engine gets it, to go on behind the tokens that are here."""
        return msgspec.structs.replace(self.request, request_id=wire_id, output_token_ids=self.tokens)

    def put(self, delta: Delta, *, alone: bool = False) -> None:
        """Add what came. Deltas that the consumer was too slow to take become one when it takes them.

        `alone`: nothing else has come, so the reader may have it before the consumer's turn, where it waits for it.
        """
        if delta.token_ids:
            self.tokens += delta.token_ids
            self.strikes = self.lone_strikes = 0
            self.moved = True
        delta.request_id = self.request.request_id
        waiter = self._waiter
        waits = waiter is not None and not waiter.done()
        if waits and alone and self.reader is not None and delta.finish_reason is None and self._read(delta):
            return
        self._untaken.append(delta)
        if waiter is not None and waits:
            waiter.set_result(None)
        elif len(self._untaken) >= _MOST_UNTAKEN:  # so that memory grows with tokens only
            self._untaken = [merge(self._untaken)]

    def _read(self, delta: Delta) -> bool:
        """Whether the reader took it. What goes wrong there is the consumer's to raise."""
        try:
            return self.reader is not None and self.reader(delta)
        except Exception as error:
            self.reader = None
            if self._waiter is not None:
                self._waiter.set_exception(error)
            return True

    def take(self) -> Delta | None:
        """What came since the last time, for the one consumer that a stream has."""
        deltas = self._untaken
        if not deltas:
            return None
        self._untaken = []
        return deltas[0] if len(deltas) == 1 else merge(deltas)

    def come(self) -> asyncio.Future[None]:
        """Is done when there is something to take, where there was nothing."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()  # once: the call asks the kernel which process this is
        self._waiter = self._loop.create_future()
        return self._waiter


def merge(deltas: Sequence[Delta]) -> Delta:
    """One delta that says what several in a row say."""
    last = deltas[-1]
    with_logprobs = [delta.logprobs for delta in deltas if delta.logprobs is not None]
    return Delta(
        request_id=last.request_id,
        token_ids=[token for delta in deltas for token in delta.token_ids],
        logprobs=[one for logprobs in with_logprobs for one in logprobs] if with_logprobs else None,
        prompt_logprobs=next((d.prompt_logprobs for d in deltas if d.prompt_logprobs is not None), None),
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        cached_tokens=next((delta.cached_tokens for delta in deltas if delta.cached_tokens), 0),
        error=last.error,
        text="".join([delta.text for delta in deltas]),
        pooled=last.pooled,
    )


class DeltaStream(AsyncGenerator[Delta, None]):
    """What `EngineClient.generate` gives. Closing it, cancelling its consumer or dropping it cancels the request.

    Not a generator function: the request is taken in, or refused, when it is made, and closing it works unstarted.
    """

    def __init__(self, stream: Stream, release: Callable[[Stream], None]) -> None:
        self._stream = stream
        self._release = release
        self._closed = False

    def read_by(self, reader: Callable[[Delta], bool]) -> None:
        """Let `reader` have deltas as soon as they come, while the consumer waits for one. False: it did not take it.

        The last delta always goes to the consumer.
        """
        self._stream.reader = reader

    async def asend(self, value: None) -> Delta:
        return await self.__anext__()

    async def __anext__(self) -> Delta:
        if self._closed:
            raise StopAsyncIteration
        try:
            while (delta := self._stream.take()) is None:
                await self._stream.come()
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
