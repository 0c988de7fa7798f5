"""Streams of events to one client: heartbeats, slow readers, clients that leave, errors after the headers."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, Protocol, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pagoda.api.http.body import ClientGone
from pagoda.api.http.dialect import OPENAI, Dialect
from pagoda.api.http.errors import JSON, DeadlineExceeded, ShuttingDown, error_reply
from pagoda.errors import EngineError, PagodaError

log = logging.getLogger("pagoda.api")

HEARTBEAT_S = 15.0
STALL_S = 60.0
LAST_WORD_S = 1.0
CLIENT_CLOSED = 499
CONNECTION = "pagoda.connection"
"""Extension of a scope: `cut` ends the connection without waiting for unsent bytes; `outlet` sends parts of a streamed
answer that need not be waited for."""

_HEADERS = (
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)
T = TypeVar("T")


class Outlet(Protocol):
    """The short way to a client: while it is `ready`, parts of a streamed answer may be sent at once."""

    @property
    def ready(self) -> bool: ...
    def send(self, data: bytes) -> None: ...


class Call(Protocol):
    """What a reply is sent for: it may have a time limit of its own, and is closed with the status it got.

    `outlet` is set while its events are sent, for events that cannot wait to be asked for.
    """

    outlet: Outlet | None

    @property
    def id(self) -> str: ...
    @property
    def deadline_s(self) -> float | None: ...
    @property
    def time_left_s(self) -> float | None: ...
    def close(self, status: int) -> None: ...


async def attend(work: Coroutine[Any, Any, T], *guards: Coroutine[Any, Any, None]) -> T:
    """The result of `work`, unless a guard raises first; whatever is still running then is cancelled."""
    task = asyncio.ensure_future(work)
    others = [asyncio.ensure_future(guard) for guard in guards]
    try:
        await asyncio.wait([task, *others], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        for other in others:
            if other.done():
                other.result()
        raise RuntimeError("a guard ended without raising")
    finally:
        for each in (task, *others):
            each.cancel()
        await asyncio.gather(task, *others, return_exceptions=True)


async def until_gone(receive: Receive) -> None:
    """Raise ClientGone when the client closes its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
    raise ClientGone


async def until_over(aborted: asyncio.Event, call: Call) -> None:
    """Raise ShuttingDown when the time to finish running requests is over, DeadlineExceeded when the call's own is."""
    try:
        async with asyncio.timeout(call.time_left_s):
            await aborted.wait()
    except TimeoutError:
        raise DeadlineExceeded(
            f"the answer was not finished within deadline_s, {call.deadline_s:g} seconds",
            remedy="Give it more time, or ask for fewer tokens with max_tokens",
            param="deadline_s",
        ) from None
    raise ShuttingDown("the server shut down before this request was finished")


async def answer(
    call: Call, work: Coroutine[Any, Any, msgspec.Struct], receive: Receive, aborted: asyncio.Event
) -> Response:
    """The whole reply of a call that is not streamed; closes it whatever happens."""
    status = 500
    try:
        body = await attend(work, until_gone(receive), until_over(aborted, call))
        status = 200
        return Response(msgspec.json.encode(body), media_type=JSON)
    except ClientGone:
        status = CLIENT_CLOSED
        raise
    except PagodaError as error:
        status = error.status
        raise
    finally:
        call.close(status)


class EventStream:
    """An ASGI response that sends `events`, and closes their call whatever happens.

    The events are in the dialect already; heartbeats and errors are put into it here.
    """

    status_code = 200

    def __init__(
        self,
        call: Call,
        events: AsyncGenerator[bytes, None],
        aborted: asyncio.Event,
        dialect: Dialect = OPENAI,
        *,
        heartbeat_s: float = HEARTBEAT_S,
        stall_s: float = STALL_S,
    ) -> None:
        self.headers: dict[str, str] = {}
        self._call = call
        self._events = events
        self._aborted = aborted
        self._dialect = dialect
        self.heartbeat_s = heartbeat_s
        self._stall_s = stall_s
        self._sent_at = time.monotonic()
        self._sending_since: float | None = None
        self._outlet: Outlet | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status = 200
        self._outlet = scope.get("extensions", {}).get(CONNECTION, {}).get("outlet")
        if self._outlet is not None:
            self._call.outlet = self
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self._raw_headers()})
            status = await self._run(receive, send)
        except ClientGone:
            status = CLIENT_CLOSED
            await _cut(scope)
        finally:
            self._call.close(status)

    async def _run(self, receive: Receive, send: Send) -> int:
        failure: PagodaError | None = None
        try:
            await attend(
                self._send_events(send),
                until_gone(receive),
                until_over(self._aborted, self._call),
                self._keep_alive(send),
            )
        except PagodaError as error:
            failure = error
        except (ClientGone, asyncio.CancelledError):
            raise
        except Exception:
            log.exception("request %s failed", self._call.id)
            failure = EngineError("the server failed on this request; its log says why")
        try:
            async with asyncio.timeout(LAST_WORD_S):
                if failure is not None:
                    await self._send(send, self._dialect.line(self._dialect.error(error_reply(failure).error)))
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            raise ClientGone from None
        return 200 if failure is None else failure.status

    async def _send_events(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            async for data in events:
                if self.ready:
                    self.send(data)
                else:
                    await self._send(send, data)

    @property
    def ready(self) -> bool:
        return self._outlet is not None and self._outlet.ready

    def send(self, data: bytes) -> None:
        """Send a part now; only while `ready`."""
        if self._outlet is not None:
            self._outlet.send(data)
            self._sent_at = time.monotonic()

    async def _send(self, send: Send, data: bytes) -> None:
        self._sending_since = time.monotonic()
        await send({"type": "http.response.body", "body": data, "more_body": True})
        self._sending_since = None
        self._sent_at = time.monotonic()

    async def _keep_alive(self, send: Send) -> None:
        """Send a comment when nothing else was sent for a while; raise ClientGone when the client reads nothing."""
        while True:
            now = time.monotonic()
            if self._sending_since is not None:
                if now - self._sending_since >= self._stall_s:
                    log.info("request %s: the client reads nothing, dropped", self._call.id)
                    raise ClientGone
                await asyncio.sleep(min(1.0, self._stall_s / 4))
            elif (wait := self._sent_at + self.heartbeat_s - now) > 0:
                await asyncio.sleep(min(wait, HEARTBEAT_S))
            elif self._dialect.heartbeat:
                await self._send(send, self._dialect.heartbeat)
            else:
                self._sent_at = now

    def _raw_headers(self) -> list[tuple[bytes, bytes]]:
        named = {"content-type": self._dialect.media_type, **self.headers}
        return [*_HEADERS, *((name.encode("latin-1"), value.encode("latin-1")) for name, value in named.items())]


async def _cut(scope: Scope) -> None:
    extension = scope.get("extensions", {}).get(CONNECTION)
    if extension is not None:
        extension["cut"]()
        # The transport tells its protocol in the loop's next turn; until then the answer looks unfinished to it.
        await asyncio.sleep(0)


Reply = Response | EventStream
"""What a route gives back."""
