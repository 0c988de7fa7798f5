"""One life of the engine process, seen from the server: its start, its socket, its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import cast

import msgspec

from pagoda.config import EngineConfig
from pagoda.engine.messages import Framer, FromEngine, ProtocolError, Shutdown, ToEngine, frame

COMMAND = (sys.executable, "-P", "-m", "pagoda.engine.process")
_STDERR = 2
_EXIT_S = 2.0
_POLL_S = 0.01

_log = logging.getLogger(__name__)


def _environment(config: EngineConfig) -> dict[str, str]:
    """Ours; numpy's own threads serve the reference executor only, elsewhere they would just take memory."""
    threads = {} if config.device == "reference" else {"OPENBLAS_NUM_THREADS": "1"}
    return {**os.environ, **threads}


class Link(asyncio.Protocol):
    """Starts the process on construction, without a running loop, so that it loads while the server still imports.

    Call it in a thread that lives as long as the server: Linux kills the engine when that thread ends.
    """

    def __init__(self, config: EngineConfig, command: Sequence[str] = COMMAND) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            # Its own process group: a terminal's Ctrl-C is for the server. Standard output belongs to the server.
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=_STDERR,
                process_group=0,
                env=_environment(config),
            )
        with contextlib.suppress(BrokenPipeError):  # dead already; `lost` will tell
            ours.sendall(frame(config))
        self._sock = ours
        self._framer = Framer()
        self._decoder = msgspec.msgpack.Decoder(FromEngine)
        self._transport: asyncio.Transport | None = None
        self._on_message: Callable[[FromEngine], None] = _ignore
        self.lost = asyncio.Event()

    @property
    def pid(self) -> int:
        return self._process.pid

    async def connect(self, on_message: Callable[[FromEngine], None]) -> None:
        """Hear the engine from now on; `lost` is set when it is gone."""
        self._on_message = on_message
        await asyncio.get_running_loop().create_unix_connection(lambda: self, sock=self._sock)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        try:
            for body in self._framer.feed(data):
                self._on_message(self._decoder.decode(body))
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


def _ignore(message: FromEngine) -> None:
    """Before `connect` nothing is heard."""


def describe_exit(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"
