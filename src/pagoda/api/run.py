"""The serving process: wait for the engine, serve until told to stop, let requests finish."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any, Protocol

import uvicorn
from starlette.types import ASGIApp

from pagoda import heap, short_turns
from pagoda.api.app import create_app
from pagoda.api.batch.runner import BatchRunner
from pagoda.api.http.connection import Connection
from pagoda.api.http.listen import BACKLOG, bind_socket, cannot_listen
from pagoda.api.notify import Notifier
from pagoda.api.serving.server import Server
from pagoda.backend.base import Progress
from pagoda.errors import ConfigError
from pagoda.options.http import HttpOptions

__all__ = ["bind_socket", "run_server", "settle_memory"]

log = logging.getLogger("pagoda.api")

DRAIN_S = 30.0
CLOSE_S = 3
_GC_OBJECTS = 20_000
EXIT_ENGINE_DEAD = 70


class StartedEngine(Protocol):
    """What starting and stopping needs of `pagoda.engine.client.EngineClient`."""

    on_dead: Callable[[str], None] | None

    @property
    def responsive(self) -> bool: ...
    async def start(self, on_progress: Progress | None = None) -> None: ...
    async def stop(self) -> None: ...


def run_server(
    server: Server,
    engine: StartedEngine,
    listener: socket.socket,
    *,
    drain_s: float = DRAIN_S,
    on_progress: Progress | None = None,
    on_ready: Callable[[], None] | None = None,
    notifier: Notifier | None = None,
) -> int:
    """Load, serve, drain. Returns the exit code; raises the PagodaError that loading ended with.

    `server.engine` and `engine` are the same object, once as the routes see it and once as its owner does. The
    listener already holds the port, but nobody is answered before the engine is ready. `on_ready` is called then.
    `notifier` tells the service manager, if there is one.
    """
    http = http_server(create_app(server), server.options)
    with asyncio.Runner(loop_factory=http.config.get_loop_factory()) as runner:
        return runner.run(
            _Serving(server, engine, listener, http, notifier or Notifier({})).run(drain_s, on_progress, on_ready)
        )


class _Serving:
    """The life of one serving process, from loading to the last answer."""

    def __init__(
        self, server: Server, engine: StartedEngine, listener: socket.socket, http: HttpServer, notifier: Notifier
    ) -> None:
        self._server = server
        self._engine = engine
        self._listener = listener
        self._http = http
        self._notifier = notifier
        self._stopping = asyncio.Event()
        self._dead = False

    async def run(self, drain_s: float, on_progress: Progress | None, on_ready: Callable[[], None] | None) -> int:
        self._engine.on_dead = self._on_dead
        short_turns.take()
        try:
            with stop_signals(self._stopping):
                loading = asyncio.ensure_future(self._engine.start(self._progress(on_progress)))
                if not await either(loading, self._stopping):
                    loading.cancel()
                    return 0
                serving = await listen(self._http, self._listener)
                if on_ready is not None:
                    on_ready()
                self._notifier.send(READY=1)
                async with self._batches(), self._beats():
                    await either(serving, self._stopping)
                await self._finish(serving, drain_s)
        finally:
            self._notifier.send(STOPPING=1)
            await self._engine.stop()
        return EXIT_ENGINE_DEAD if self._dead else 0

    def _progress(self, shown: Progress | None) -> Progress:
        def both(phase: str, share: float) -> None:
            self._notifier.loading(phase, share)
            if shown is not None:
                shown(phase, share)

        return both

    def _on_dead(self, reason: str) -> None:
        log.error("the engine is gone for good: %s", reason)
        self._dead = True
        self._stopping.set()

    @contextlib.asynccontextmanager
    async def _beats(self) -> AsyncGenerator[None, None]:
        """Tell the service manager meanwhile that the engine lives, as long as it does."""
        beating = asyncio.create_task(self._notifier.beat(lambda: self._engine.responsive, self._status))
        try:
            yield
        finally:
            beating.cancel()
            await asyncio.wait([beating])

    def _status(self) -> str:
        """One line for `systemctl status`."""
        now = self._server.engine.stats.scheduler
        state = "" if self._server.state == "ready" else f"{self._server.state}, "
        return f"{state}{now.running} running, {now.waiting} waiting, {now.generation_tokens} tokens generated"

    @contextlib.asynccontextmanager
    async def _batches(self) -> AsyncGenerator[None, None]:
        """Work on batches meanwhile; they go on when the server is started again."""
        if self._server.batches is None:
            yield
            return
        working = asyncio.create_task(BatchRunner(self._server, self._server.batches).run())
        try:
            yield
        finally:
            working.cancel()
            await asyncio.wait([working])

    async def _finish(self, serving: asyncio.Future[None], drain_s: float) -> None:
        limit_s = 0.0 if self._dead else drain_s
        if self._server.busy:
            log.info("shutting down: running requests have %g s to finish", limit_s)
        await self._server.drain(limit_s)
        self._http.should_exit = True
        await serving


async def listen(http: HttpServer, listener: socket.socket) -> asyncio.Future[None]:
    """Listen only now: who finds the port open may send, and is answered at once."""
    try:
        listener.listen(BACKLOG)
    except OSError as error:
        host, port = listener.getsockname()[:2]
        raise cannot_listen(error, host, port) from None
    serving = asyncio.ensure_future(http.serve([listener]))
    while not http.started and not serving.done():
        await asyncio.sleep(0.002)
    return serving


async def either(task: asyncio.Future[None], stopping: asyncio.Event) -> bool:
    """Wait for the task or for the signal to stop. True: the task is done (its error is raised)."""
    stop = asyncio.ensure_future(stopping.wait())
    both: list[asyncio.Future[Any]] = [task, stop]
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stop.cancel()
    if task.done():
        task.result()
        return True
    return False


def settle_memory() -> None:
    """For `on_ready`: look for garbage rarely, never in vocabulary and templates; each token makes a few objects."""
    heap.settle()
    gc.set_threshold(_GC_OBJECTS, 20, 50)
    gc.enable()


@contextlib.contextmanager
def stop_signals(stopping: asyncio.Event) -> Iterator[None]:
    """The first SIGTERM or SIGINT asks to stop; a second one ends the process at once, as if nobody handled it."""
    if threading.current_thread() is not threading.main_thread():
        # Only the main thread may handle signals; whoever runs the server elsewhere has a way of its own to stop.
        yield
        return
    loop = asyncio.get_running_loop()
    caught = (signal.SIGTERM, signal.SIGINT)

    def stop() -> None:
        stopping.set()
        for each in caught:
            loop.remove_signal_handler(each)
            signal.signal(each, signal.SIG_DFL)

    for each in caught:
        loop.add_signal_handler(each, stop)
    try:
        yield
    finally:
        for each in caught:
            loop.remove_signal_handler(each)


class HttpServer(uvicorn.Server):
    """uvicorn without its own handling of signals: ours lets requests finish first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def http_server(app: ASGIApp, options: HttpOptions) -> HttpServer:
    """Raises ConfigError for certificates that cannot be used."""
    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=CLOSE_S,
        ssl_certfile=options.ssl_certfile,
        ssl_keyfile=options.ssl_keyfile,
        ssl_ca_certs=options.ssl_ca_certs,
        ssl_cert_reqs=options.ssl_cert_reqs,
        ssl_ciphers=options.ssl_ciphers,
    )
    try:
        config.load()
    except OSError as error:  # of which those of OpenSSL are a kind
        files = ", ".join(filter(None, (options.ssl_certfile, options.ssl_keyfile, options.ssl_ca_certs)))
        reason = error.strerror or str(error)
        raise ConfigError(
            f"TLS with {files}: {reason}", remedy="Give --ssl-certfile and --ssl-keyfile as PEM"
        ) from None
    return HttpServer(config)
