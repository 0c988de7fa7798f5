"""POST /api/pull and DELETE /api/delete: models on this machine, beside the one that is served."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import threading
from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.requests import Request
from starlette.responses import Response

from pagoda.api.http.body import ClientGone, parse, read_body
from pagoda.api.http.errors import JSON, to_json
from pagoda.api.http.stream import EventStream, Outlet, Reply, answer
from pagoda.api.ollama.options import resolve
from pagoda.api.ollama.protocol import OLLAMA, OllamaNameBody, OllamaStatus, line
from pagoda.api.serving.access import check_may_change
from pagoda.api.serving.hub import Hub
from pagoda.api.serving.server import Server
from pagoda.errors import BadRequest, ModelNotFound

_TICK_S = 0.2
_HOSTS = ("hf.co/", "huggingface.co/")


async def pull(server: Server, request: Request) -> Reply:
    """Success for what is served; any other model is fetched from its hub, for `pagoda serve` to serve."""
    body, ignored = parse(await read_body(request), OllamaNameBody)
    hub = _hub_for(server, body)
    reply: Reply
    if hub is None:
        done = OllamaStatus(status="success")
        lines = line(OllamaStatus(status="pulling manifest")) + line(done)
        reply = Response(lines, media_type=OLLAMA.media_type) if body.stream else Response(to_json(done), 200, {}, JSON)
    else:
        call = _Pull(hub, _hub_name(body))
        if body.stream:
            reply = EventStream(call, call.lines(), server.aborted, OLLAMA)
        else:
            reply = await answer(call, call.whole(), request.receive, server.aborted)
    server.dress(reply, ignored)
    return reply


async def delete(server: Server, request: Request) -> Response:
    """Remove a model from the caches, or one that was made of the served one."""
    body, ignored = parse(await read_body(request), OllamaNameBody)
    made = _name(body).removesuffix(":latest")
    root = None if server.hub is None or server.served.has(made) else server.hub.created(made)
    if server.hub is not None and root is not None:
        check_may_change(server)
        await asyncio.to_thread(server.hub.delete, made)
        server.derived.forget(made, root)
        reply = Response(status_code=200)
        server.dress(reply, ignored)
        return reply
    hub = _hub_for(server, body)
    if hub is None:
        name = resolve(server, _name(body))
        if server.derived.get(name) is None or server.served.is_own(name):
            raise BadRequest(f"model '{_name(body)}' is being served", remedy="Stop this server first", param="model")
        check_may_change(server)
        server.derived.delete(name)
    else:
        await asyncio.to_thread(hub.delete, _hub_name(body))
    reply = Response(status_code=200)
    server.dress(reply, ignored)
    return reply


def _name(body: OllamaNameBody) -> str:
    return (body.model or body.name)[:200]


def _hub_name(body: OllamaNameBody) -> str:
    """The name without what Ollama's users put around a hub's."""
    name = _name(body).removesuffix(":latest")
    return next((name.removeprefix(host) for host in _HOSTS if name.startswith(host)), name)


def _hub_for(server: Server, body: OllamaNameBody) -> Hub | None:
    """Where the model is to be had; None: it is served here. Raises ModelNotFound for what is no hub's name."""
    try:
        resolve(server, _name(body))
    except ModelNotFound as error:
        if server.hub is None or "/" not in _hub_name(body):
            remedy = "Hubs have owner/name, such as Qwen/Qwen3-0.6B" if server.hub else ""
            raise ModelNotFound(error.message, remedy=remedy, param="model") from None
    else:
        return None
    check_may_change(server)
    return server.hub


class _Pull:
    """One pull, as a call that is answered with lines; without a reader it ends, and what was fetched is kept."""

    deadline_s = None
    time_left_s = None
    outlet: Outlet | None = None

    def __init__(self, hub: Hub, name: str) -> None:
        self.id = f"pull-{secrets.token_hex(16)}"
        self._hub = hub
        self._name = name
        self._digest = f"sha256:{hashlib.sha256(name.encode()).hexdigest()}"
        self._stop = threading.Event()
        self._seen = (0, 0)

    async def lines(self) -> AsyncGenerator[bytes, None]:
        yield line(OllamaStatus(status="pulling manifest"))
        async with aclosing(self._progress()) as progress:
            async for done, total in progress:
                status = f"pulling {self._name}"
                yield line(OllamaStatus(status=status, digest=self._digest, total=total, completed=done))
        yield line(OllamaStatus(status=f"to serve it in place of this server's model: pagoda serve {self._name}"))
        yield line(OllamaStatus(status="success"))

    async def whole(self) -> OllamaStatus:
        async with aclosing(self._progress()) as progress:
            async for _ in progress:
                pass
        return OllamaStatus(status="success")

    def close(self, status: int) -> None:
        self._stop.set()

    async def _progress(self) -> AsyncGenerator[tuple[int, int], None]:
        """Bytes that are here and those of the whole, whenever there are more. Raises what ended the pull."""
        task = asyncio.ensure_future(asyncio.to_thread(self._hub.pull, self._name, self._show))
        # Nobody may be there to hear of its error any more.
        task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        told = (0, 0)
        try:
            while not task.done():
                await asyncio.wait([task], timeout=_TICK_S)
                if self._seen != told:
                    told = self._seen
                    yield told
            task.result()
        finally:
            self._stop.set()

    def _show(self, done: int, total: int) -> None:
        if self._stop.is_set():
            raise ClientGone
        self._seen = (done, total)
