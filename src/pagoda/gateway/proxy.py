"""Passes a request on to the model that it means, or to the upstream, and the answer back as it comes."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import ExitStack, aclosing, contextmanager
from dataclasses import replace

from starlette.requests import Request
from starlette.responses import Response

from pagoda.api.http.errors import ShuttingDown
from pagoda.api.http.stream import HEARTBEAT_S, EventStream, Outlet, Reply, attend, until_gone, until_over
from pagoda.api.ollama.options import not_found
from pagoda.api.ollama.protocol import OLLAMA
from pagoda.api.serving.endpoint import Endpoint
from pagoda.api.serving.names import not_served
from pagoda.errors import Overloaded, PagodaError
from pagoda.gateway.child import Child
from pagoda.gateway.fleet import Fleet, looked_at
from pagoda.gateway.passing import CHANGES, Passing, error_of, read, unloaded
from pagoda.gateway.policy import keep_alive_s
from pagoda.gateway.upstream import Upstream
from pagoda.gateway.wire import Answer, Unreachable, call

UPSTREAM, FALLBACK = "x-pagoda-upstream", "x-pagoda-fallback"
PATIENCE_S = 5.0
"""How long a stream waits for its model before it begins with a sign of life; until then errors have their status."""
MAX_HELD_BYTES = 1 << 30
"""Of the bodies of all requests that are here: they may have to wait for a model."""
_TRIES = 3
_SETTLE_S = 0.2
_CANNOT_NOW = frozenset(("server_overloaded", "shutting_down"))

log = logging.getLogger("pagoda.gateway")


class ModelServerGone(PagodaError):
    """The server of a model, or the upstream, ended in the middle of an answer."""

    status = 502
    code = "model_server_gone"
    type = "InternalServerError"


class Visit:
    """One request that is here, as `EventStream` sees it; closing it lets go of what it holds."""

    def __init__(self) -> None:
        self.id = f"gateway-{secrets.token_hex(8)}"
        self.deadline_s: float | None = None
        self.time_left_s: float | None = None
        self.outlet: Outlet | None = None
        self.held = ExitStack()

    def close(self, status: int) -> None:
        self.held.close()


class Proxy:
    """`aborted` is set when the time to finish what runs is over."""

    def __init__(
        self, fleet: Fleet, upstream: Upstream | None, *, fallback: bool = False, fallback_model: str | None = None
    ) -> None:
        self.fleet = fleet
        self.upstream = upstream
        self.live = 0
        self._held_bytes = 0
        self.fallbacks = 0
        self.draining = False
        self.aborted = asyncio.Event()
        self.falls_back = fallback and upstream is not None
        self._fallback_model = fallback_model

    async def answer(self, endpoint: Endpoint, request: Request) -> Reply:
        """The reply of whoever has the model that the request names."""
        if self.draining:
            raise ShuttingDown("the server is shutting down")
        passing = await read(endpoint, request)
        with self._visit(len(passing.body)) as visit:
            if request.path_params and not passing.body:
                return await self._stored(passing, visit)
            child = self.fleet.find(passing.model)
            if child is None and endpoint.path in CHANGES:
                if endpoint.path == "/api/delete":
                    self.fleet.check_unused(passing.model or "")
                child = self.fleet.first
            if child is not None:
                if passing.new_name:
                    self.fleet.check_new(passing.new_name, child)
                return await self._of_child(passing, child, visit)
            if self.upstream is not None:
                return await self._of_upstream(passing, visit)
            raise (not_found if passing.dialect is OLLAMA else not_served)(passing.model or "", self.fleet.names)

    @contextmanager
    def _visit(self, size_bytes: int) -> Iterator[Visit]:
        """A request that is counted until its visit is closed: at once where nobody takes it over."""
        if self.live and self._held_bytes + size_bytes > MAX_HELD_BYTES:
            raise Overloaded("the server is busy: too many requests are waiting", remedy="Try again in a moment")
        visit = Visit()
        self.live += 1
        self._held_bytes += size_bytes
        visit.held.callback(self._leave, size_bytes)
        try:
            yield visit
        except BaseException:
            visit.close(500)
            raise

    def _leave(self, size_bytes: int) -> None:
        self.live -= 1
        self._held_bytes -= size_bytes

    async def _of_child(self, passing: Passing, child: Child, visit: Visit) -> Reply:
        """The answer of a model of ours, when it is loaded."""
        given = passing.asked.keep_alive
        if passing.endpoint.tasks:
            child.keep_alive_s = child.usual_keep_alive_s if given is None else keep_alive_s(given)
        if child.state == "stopped" and not child.keep_alive_s and passing.asks_nothing:
            visit.close(200)
            return unloaded(passing)
        if child.state == "ready" or not self.falls_back:
            visit.held.enter_context(child.claim())
        if child.state != "ready":
            loading = asyncio.ensure_future(self.fleet.loaded(child))
            loading.add_done_callback(looked_at)
            if self.falls_back:
                reason = "its server is down" if child.crashed else "it is not loaded yet"
                return await self._of_upstream(passing, visit, reason)
            try:
                limit_s = PATIENCE_S if passing.streams else None
                waiting = asyncio.wait([loading], timeout=limit_s)
                await attend(waiting, until_gone(passing.request.receive), until_over(self.aborted, visit))
                if not loading.done():
                    return self._stream(passing, visit, self._late(passing, child, loading, visit))
                loading.result()
            except BaseException:
                loading.cancel()
                raise
        answer = await attend(self._reach(passing, child, visit), until_gone(passing.request.receive))
        if answer.status == 503 and self.falls_back and error_of(body := await answer.whole()).code in _CANNOT_NOW:
            return await self._of_upstream(passing, visit, f"it answers: {error_of(body).message}"[:100])
        reply = await self._reply(passing, visit, answer, answer.kept_headers(), child.sized.name)
        if passing.endpoint.path in CHANGES:
            self.fleet.read_names()
        return reply

    async def _reach(self, passing: Passing, child: Child, visit: Visit) -> Answer:
        """The head of its answer. Where its server ends before that, it is started again and asked again."""
        for attempt in range(1, _TRIES + 1):
            await self.fleet.loaded(child)
            with ExitStack() as held:
                held.enter_context(child.use())
                try:
                    headers = {**passing.headers, **child.credentials(passing.credentials)}
                    answer = await call(child.place, passing.method, passing.path, headers, passing.body)
                except Unreachable as error:
                    log.warning("%s: no answer to try %d: %s", child.sized.name, attempt, error)
                else:
                    visit.held.push(held.pop_all())
                    return answer
            await asyncio.sleep(_SETTLE_S)  # so that we know of its end
        raise ModelServerGone(f"the server of {child.sized.name} ended {_TRIES} times without an answer")

    async def _late(
        self, passing: Passing, child: Child, loading: asyncio.Future[None], visit: Visit
    ) -> AsyncGenerator[bytes, None]:
        """The events of a stream that begins before its model is there."""
        try:
            while not loading.done():
                if passing.dialect.heartbeat:
                    yield passing.dialect.heartbeat
                await asyncio.wait([loading], timeout=HEARTBEAT_S)
            loading.result()
            answer = await self._reach(passing, child, visit)
            if answer.status != 200:
                yield passing.dialect.line(passing.dialect.error(error_of(await answer.whole())))
                return
            async with aclosing(_parts(answer, child.sized.name)) as parts:
                async for part in parts:
                    yield part
        finally:
            loading.cancel()

    async def _of_upstream(self, passing: Passing, visit: Visit, reason: str = "") -> Reply:
        """The answer of the upstream; `reason` says why it answers for a model of ours."""
        if self.upstream is None:
            raise RuntimeError("there is no upstream")
        name = str(self.upstream.place)
        headers = {UPSTREAM: name}
        if reason:
            self.fallbacks += 1
            log.warning("%s: answered by the upstream %s: %s", passing.model or self.fleet.names[0], name, reason)
            headers[FALLBACK] = reason.encode("ascii", "replace").decode()
            passing = passing.renamed(self._fallback_model or passing.model or self.fleet.names[0])
        sending = self.upstream.send(passing.method, passing.shown, passing.headers, passing.body)
        answer = await attend(sending, until_gone(passing.request.receive))
        return await self._reply(passing, visit, answer, {**answer.kept_headers(), **headers}, f"the upstream {name}")

    async def _stored(self, passing: Passing, visit: Visit) -> Reply:
        """What a model's server keeps for its clients (answers, files) is looked for in each that runs."""
        running = [child for child in self.fleet.children if child.state == "ready"] or [self.fleet.first]
        for child in running:
            answer = await attend(self._reach(passing, child, visit), until_gone(passing.request.receive))
            if answer.status != 404 or child is running[-1]:
                break
            answer.close()
        return await self._reply(passing, visit, answer, answer.kept_headers(), child.sized.name)

    async def _reply(
        self, passing: Passing, visit: Visit, answer: Answer, headers: Mapping[str, str], who: str
    ) -> Reply:
        kind = answer.headers.get("content-type")
        named = {**headers, **({} if kind is None else {"content-type": kind})}
        if answer.is_stream and answer.status == 200:
            stream = self._stream(passing, visit, _parts(answer, who))
            stream.headers.update(named)
            return stream
        try:
            over = until_over(self.aborted, visit)
            body = await attend(answer.whole(), until_gone(passing.request.receive), over)
        except Unreachable as error:
            raise ModelServerGone(f"{who}: {error}") from None
        visit.close(answer.status)
        return Response(body, answer.status, named)

    def _stream(self, passing: Passing, visit: Visit, events: AsyncGenerator[bytes, None]) -> EventStream:
        # Whoever answers sends signs of life himself: one of ours could fall into the middle of an event.
        return EventStream(visit, events, self.aborted, replace(passing.dialect, heartbeat=b""))


async def _parts(answer: Answer, who: str) -> AsyncGenerator[bytes, None]:
    """The answer as it comes; one that is cut off ends with an error that says so."""
    try:
        async with aclosing(answer.parts()) as parts:
            async for part in parts:
                yield part
    except Unreachable as error:
        raise ModelServerGone(f"{who}: {error}") from None
