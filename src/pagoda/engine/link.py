"""One life of the engine process, seen from the server: its start, its socket, its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import msgspec

from pagoda.engine.messages import Framer, FromEngine, ProtocolError, Shutdown, ToEngine, frame
from pagoda.engine.spawn import COMMAND, EngineProcess
from pagoda.options.engine_config import EngineConfig

_EXIT_S = 2.0
_POLL_S = 0.01

_log = logging.getLogger(__name__)

Hear = Callable[[FromEngine, bool], None]
"""Takes a message, and whether it came alone: then the server keeps up with the engine."""


class Link(asyncio.Protocol):
    """Starts the process on construction, without a running loop, so that it loads while the server still imports;
    `process` is one that was started before, and waits for its configuration."""

    def __init__(
        self,
        config: EngineConfig,
        command: Sequence[str] = COMMAND,
        process: EngineProcess | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self._process, self._sock = (process or EngineProcess(config.device, command, environ or {})).take()
        with contextlib.suppress(BrokenPipeError):  # dead already; `lost` will tell
            self._sock.sendall(frame(config))
        self._framer = Framer()
        self._decoder = msgspec.msgpack.Decoder(FromEngine)
        self._transport: asyncio.Transport | None = None
        self._on_message: Hear = _ignore
        self.lost = asyncio.Event()

    @property
    def pid(self) -> int:
        return self._process.pid

    async def connect(self, on_message: Hear) -> None:
        """Hear the engine from now on; `lost` is set when it is gone."""
        self._on_message = on_message
        await asyncio.get_running_loop().create_unix_connection(lambda: self, sock=self._sock)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        try:
            bodies = self._framer.feed(data)
            for body in bodies:
                self._on_message(self._decoder.decode(body), len(bodies) == 1)
        except (ProtocolError, msgspec.DecodeError):
            _log.exception("the engine sent what is no message; it is stopped")
            self.kill()

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set()

    def send(self, message: ToEngine) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frame(message))

    def dump_stacks(self) -> None:
        """Let the engine write to the log where it hangs."""
        self._process.send_signal(signal.SIGUSR1)

    def kill(self) -> None:
        self._process.kill()

    async def reap(self) -> int:
        """Wait for the process that has closed its socket, or kill it; its exit code, negative for a signal."""
        waited_s = 0.0
        while (code := self._process.poll()) is None:
            await asyncio.sleep(_POLL_S)
            waited_s += _POLL_S
            if waited_s > _EXIT_S:
                self.kill()
        self.close()
        return code

    async def stop(self, *, kill: bool) -> None:
        """End the process; one that loads does not hear, and is killed."""
        if kill:
            self.kill()
        else:
            self.send(Shutdown())
        self.close()
        await self.reap()

    def close(self) -> None:
        """Close our end; an engine that still runs ends when it sees it."""
        if self._transport is not None:
            self._transport.close()
        else:
            self._sock.close()


def _ignore(message: FromEngine, alone: bool) -> None:
    """Before `connect` nothing is heard."""


def describe_exit(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"
