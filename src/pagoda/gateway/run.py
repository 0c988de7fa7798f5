"""The gateway's process: it loads the first model, serves until told to stop, and lets requests finish."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path

from pagoda.api.notify import Notifier
from pagoda.api.run import HttpServer, either, http_server, listen, stop_signals
from pagoda.api.serving.blobs import BlobStore
from pagoda.gateway.app import Gateway, create_app
from pagoda.gateway.fleet import Fleet, looked_at
from pagoda.gateway.proxy import Proxy
from pagoda.gateway.sizes import Sized
from pagoda.gateway.upstream import Upstream
from pagoda.options.config import Options

_TICK_S = 0.02

log = logging.getLogger("pagoda.gateway")


def run_gateway(
    options: Options,
    models: Sequence[Sized],
    budget_bytes: int,
    upstream: Upstream | None,
    derived: Path | None,
    blobs: BlobStore,
    listener: socket.socket,
    *,
    version: str,
    local: bool,
    on_ready: Callable[[], None],
    notifier: Notifier,
) -> int:
    """The exit code; raises the PagodaError that loading the first model ended with."""
    with tempfile.TemporaryDirectory(prefix="pagoda-", ignore_cleanup_errors=True) as folder:
        fleet = Fleet(models, budget_bytes, Path(folder), derived, options.api_key)
        proxy = Proxy(fleet, upstream, fallback=options.fallback, fallback_model=options.fallback_model)
        gateway = Gateway(proxy=proxy, blobs=blobs, version=version)
        http = http_server(create_app(gateway, options, local=local), options)
        with asyncio.Runner(loop_factory=http.config.get_loop_factory()) as runner:
            return runner.run(_serve(gateway, http, listener, options.shutdown_timeout, on_ready, notifier))


async def _serve(
    gateway: Gateway,
    http: HttpServer,
    listener: socket.socket,
    drain_s: float,
    on_ready: Callable[[], None],
    notifier: Notifier,
) -> int:
    fleet, stopping = gateway.proxy.fleet, asyncio.Event()
    try:
        with stop_signals(stopping):
            loading = asyncio.ensure_future(fleet.loaded(fleet.first))
            loading.add_done_callback(looked_at)
            # With a fallback there is somebody to answer meanwhile.
            if not gateway.proxy.falls_back and not await either(loading, stopping):
                loading.cancel()
                return 0
            serving = await listen(http, listener)
            on_ready()
            notifier.send(READY=1)
            async with fleet.tended(), _beats(gateway, notifier):
                await either(serving, stopping)
            loading.cancel()
            await _finish(gateway.proxy, drain_s)
            http.should_exit = True
            await serving
    finally:
        notifier.send(STOPPING=1)
        await fleet.stop()
    return 0


@contextlib.asynccontextmanager
async def _beats(gateway: Gateway, notifier: Notifier) -> AsyncGenerator[None, None]:
    """Tell the service manager meanwhile how many models are loaded."""

    def status() -> str:
        children = gateway.proxy.fleet.children
        up = sum(child.state == "ready" for child in children)
        return f"{up} of {len(children)} models loaded, {gateway.proxy.live} requests running"

    beating = asyncio.create_task(notifier.beat(lambda: True, status))
    try:
        yield
    finally:
        beating.cancel()
        await asyncio.wait([beating])


async def _finish(proxy: Proxy, drain_s: float) -> None:
    """Take nothing new, and let what runs finish within its time."""
    proxy.draining = True
    if proxy.live:
        log.info("shutting down: running requests have %g s to finish", drain_s)
    deadline = time.monotonic() + drain_s
    while proxy.live and time.monotonic() < deadline:
        await asyncio.sleep(_TICK_S)
    proxy.aborted.set()
    while proxy.live and time.monotonic() < deadline + 2:
        await asyncio.sleep(_TICK_S)
