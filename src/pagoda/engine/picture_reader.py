"""Has pictures decoded in processes of their own, and keeps the latest: chats send theirs again with every turn."""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys
from collections import OrderedDict
from collections.abc import Sequence

import msgspec

from pagoda.engine.worker import Worker
from pagoda.errors import BadRequest, Overloaded
from pagoda.media.task import TOO_MUCH, Failed, Pixels, Task

COMMAND = (sys.executable, "-P", "-m", "pagoda.engine.picture_worker")
_WALL_S = 120.0  # the worker's own limit is time on the processor; this one is for a worker that hangs
_TURN_S = 60.0
_MAX_KEPT_BYTES = 64 << 20
_MAX_WORKERS = 4
_INLINE_BYTES = 1 << 20


class PictureReader:
    """A few workers, started when they are first needed."""

    def __init__(self, *, command: Sequence[str] = COMMAND, wall_s: float = _WALL_S, turn_s: float = _TURN_S) -> None:
        self._command = tuple(command)
        self._wall_s = wall_s
        self._turn_s = turn_s
        self._idle: list[Worker] = []
        self._places = asyncio.Semaphore(min(_MAX_WORKERS, os.cpu_count() or 1))
        self._kept: OrderedDict[bytes, Pixels] = OrderedDict()
        self._kept_bytes = 0

    async def read(self, task: Task) -> Pixels:
        """Raises BadRequest with what is wrong with the picture."""
        key = _key(task) if sum(map(len, task.parts)) < _INLINE_BYTES else await asyncio.to_thread(_key, task)
        found = self._kept.get(key)
        if found is not None:
            self._kept.move_to_end(key)
            return found
        try:
            async with asyncio.timeout(self._turn_s):
                await self._places.acquire()
        except TimeoutError:
            raise Overloaded("too many pictures wait to be decoded", remedy="Try again in a moment") from None
        try:
            reply = await self._ask(task)
        finally:
            self._places.release()
        if isinstance(reply, Failed):
            raise BadRequest(reply.error)
        self._keep(key, reply)
        return reply

    async def _ask(self, task: Task) -> Pixels | Failed:
        worker = self._idle.pop() if self._idle else Worker(self._command)
        try:
            async with asyncio.timeout(self._wall_s):
                body = await worker.ask(task)
        except (TimeoutError, EOFError, ConnectionError):
            worker.end()
            return Failed(TOO_MUCH)
        except BaseException:  # half an answer would be read as the next one's
            worker.end()
            raise
        self._idle.append(worker)
        return msgspec.msgpack.decode(body, type=Pixels | Failed)

    def _keep(self, key: bytes, pixels: Pixels) -> None:
        if key in self._kept:
            return
        self._kept[key] = pixels
        self._kept_bytes += len(pixels.data)
        while self._kept_bytes > _MAX_KEPT_BYTES:
            self._kept_bytes -= len(self._kept.popitem(last=False)[1].data)

    def close(self) -> None:
        idle, self._idle = self._idle, []
        for worker in idle:
            worker.end()


def _key(task: Task) -> bytes:
    digest = hashlib.sha256(msgspec.msgpack.encode((task.sizing, task.video, [len(part) for part in task.parts])))
    for part in task.parts:
        digest.update(part)
    return digest.digest()
