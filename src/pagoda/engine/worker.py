"""A process for work that may kill it: asked over a socket, one question at a time, and ended without mercy."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
import subprocess
import sys
from asyncio import StreamReader, StreamWriter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO

from pagoda.engine.messages import frame

_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1"}


class Worker:
    """One life of the process, and the stream to it."""

    def __init__(self, command: Sequence[str]) -> None:
        self._ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                command,
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                start_new_session=True,
                env={**os.environ, **_ONE_THREAD},
            )
        self._stream: tuple[StreamReader, StreamWriter] | None = None

    async def tell(self, message: object) -> StreamReader:
        if self._stream is None:
            self._stream = await asyncio.open_connection(sock=self._ours)
        reader, writer = self._stream
        writer.write(frame(message))
        await writer.drain()
        return reader

    async def ask(self, message: object) -> bytes:
        """The body of the frame that it answers with. Raises EOFError or ConnectionError where it died of it."""
        reader = await self.tell(message)
        return await reader.readexactly(int.from_bytes(await reader.readexactly(4), "big"))

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        if self._stream is None:
            self._ours.close()
        else:
            self._stream[1].close()


def receive(source: BinaryIO) -> bytes | None:
    """In the worker: the next frame; None at the end."""
    size = source.read(4)
    return source.read(int.from_bytes(size, "big")) if len(size) == 4 else None


def send(message: object) -> None:
    """In the worker: an answer."""
    sys.stdout.buffer.write(frame(message))
    sys.stdout.buffer.flush()


def limit_memory(limit_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


@contextmanager
def limited_time(cpu_s: float) -> Iterator[None]:
    """Time on the processor, not on the clock: the signal's default is to end the process."""
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def answer_each(handle: Callable[[bytes], object], cpu_s: float) -> None:
    """In the worker: answer frames until there are no more."""
    while (message := receive(sys.stdin.buffer)) is not None:
        with limited_time(cpu_s):
            reply = handle(message)
        send(reply)
