"""Runs batches one after the other, in what the server has left over beside its clients."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec

from pagoda.api.batch.call import ask, failed, read_line
from pagoda.api.batch.protocol import BatchError, BatchErrors, BatchLine, BatchResult, KeptBatch, RequestCounts
from pagoda.api.batch.store import BatchStore
from pagoda.api.http.body import MAX_BODY_BYTES
from pagoda.api.serving.kept import DiskFull
from pagoda.api.serving.server import Server
from pagoda.errors import BadRequest

MAX_LINES = 50_000
MAX_ERRORS = 100
_TICK_S = 0.05
_ALONE, _BESIDE = 2, 8
"""The share of the engine's places that a batch takes: one of two while nobody else is there, else one of eight."""

log = logging.getLogger("pagoda.api")


class BatchRunner:
    """`run` never ends. Cancelled, it leaves on disk what it takes to go on."""

    def __init__(self, server: Server, batches: BatchStore, *, retry_s: float = 30.0) -> None:
        self._server = server
        self._batches = batches
        self._retry_s = retry_s

    async def run(self) -> None:
        while True:
            self._batches.changed.clear()
            batch = self._batches.next()
            if batch is None:
                await self._batches.changed.wait()
                continue
            try:
                await self._advance(batch)
            except (DiskFull, OSError) as error:
                log.warning("batch %s waits %g s, and is tried again: %s", batch.id, self._retry_s, error)
                await asyncio.sleep(self._retry_s)

    async def _advance(self, batch: KeptBatch) -> None:
        """Raises DiskFull or OSError where only the disk's room is missing: what is there stays good."""
        try:
            await self._work_on(batch)
        except Exception as error:
            if isinstance(error, DiskFull) or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise
            log.exception("batch %s failed", batch.id)
            await self._fail(batch, [BatchError(code="internal_error", message=type(error).__name__)])

    async def _work_on(self, batch: KeptBatch) -> None:
        if batch.status == "validating":
            errors = await asyncio.to_thread(self._validate, batch)
            if errors:
                await self._fail(batch, errors)
                return
            if batch.status == "validating":  # it may have been cancelled meanwhile
                await self._batches.enter(batch, "in_progress")
        if batch.status == "in_progress":
            await self._answer(batch)
        if batch.status in ("in_progress", "finalizing"):
            expired = batch.status == "in_progress" and time.time() >= batch.expires_at
            if not expired:
                await self._batches.enter(batch, "finalizing")
            await self._publish(batch)
            await self._batches.enter(batch, "expired" if expired else "completed")
        elif batch.status == "cancelling":
            await self._publish(batch)
            await self._batches.enter(batch, "cancelled")

    async def _fail(self, batch: KeptBatch, errors: list[BatchError]) -> None:
        batch.errors = BatchErrors(data=errors)
        await self._batches.enter(batch, "failed")

    async def _publish(self, batch: KeptBatch) -> None:
        batch.output_file_id = await asyncio.to_thread(self._batches.publish, batch, "output")
        batch.error_file_id = await asyncio.to_thread(self._batches.publish, batch, "errors")

    def _validate(self, batch: KeptBatch) -> list[BatchError]:
        """What is wrong with the input; its lines are counted."""
        errors: list[BatchError] = []
        seen: set[str] = set()
        count = 0
        with self._input(batch) as file:
            for number, raw in lines(file):
                count += 1
                try:
                    custom_id = self._read(batch, raw).custom_id
                    if custom_id in seen:
                        raise BadRequest(f"custom_id {custom_id[:80]!r} is there twice", param="custom_id")
                    seen.add(custom_id)
                    if count > MAX_LINES:
                        raise BadRequest(f"a batch holds at most {MAX_LINES} requests")
                except BadRequest as error:
                    errors.append(BatchError(code=error.code, message=str(error), line=number, param=error.param))
                if len(errors) == MAX_ERRORS or count > MAX_LINES:
                    break
        if not count:
            errors.append(BatchError(code="empty_file", message="the input holds no requests"))
        batch.request_counts.total = count
        return errors

    def _input(self, batch: KeptBatch) -> BinaryIO:
        return self._batches.files.path(batch.input_file_id).open("rb")

    def _read(self, batch: KeptBatch, raw: bytes) -> BatchLine:
        line = read_line(raw)
        if line.url != batch.endpoint:
            raise BadRequest(f"url must be the batch's endpoint, {batch.endpoint}", param="url")
        return line

    async def _answer(self, batch: KeptBatch) -> None:
        """Ask what has no result yet, until all has, the batch is cancelled, or its time is over."""
        parts = self._batches.part(batch, "output"), self._batches.part(batch, "errors")
        done = [resume(part) for part in parts]
        batch.request_counts = RequestCounts(
            total=batch.request_counts.total, completed=len(done[0]), failed=len(done[1])
        )
        had = done[0] | done[1]
        running: dict[asyncio.Task[BatchResult], BatchLine] = {}
        with self._input(batch) as file, parts[0].open("ab") as output, parts[1].open("ab") as errors:
            left = (self._read(batch, raw) for _, raw in lines(file))
            waiting = (line for line in left if line.custom_id not in had)
            try:
                line = next(waiting, None)
                while (line is not None or running) and batch.status == "in_progress":
                    if time.time() >= batch.expires_at:
                        await _cancel(running)
                        _expire(batch, [*running.values(), line, *waiting], errors)
                        return
                    while line is not None and len(running) < self._places():
                        running[asyncio.create_task(ask(self._server, line))] = line
                        line = next(waiting, None)
                    over, _ = await asyncio.wait(running, timeout=_TICK_S, return_when=asyncio.FIRST_COMPLETED)
                    for task in over:
                        del running[task]
                        _write(batch, task.result(), output, errors)
            finally:
                await _cancel(running)

    def _places(self) -> int:
        """How many requests of a batch may run now."""
        most = self._server.engine.info.max_num_seqs
        return max(1, most // (_BESIDE if self._server.interactive_sequences else _ALONE))


def lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """The lines that hold something, with their numbers. One that is too long ends as a broken one."""
    number = 0
    while raw := file.readline(MAX_BODY_BYTES):
        number += 1
        if raw.strip():
            yield number, raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw


def resume(part: Path) -> set[str]:
    """The ids of the results in a file; half a line at its end, from a crash, is cut off."""
    if not part.exists():
        return set()
    content = part.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with part.open("r+b") as file:
            file.truncate(len(whole))
    return {json.loads(line)["custom_id"] for line in whole.splitlines()}


def _write(batch: KeptBatch, result: BatchResult, output: BinaryIO, errors: BinaryIO) -> None:
    good = result.response is not None and result.response.status_code == 200
    file = output if good else errors
    file.write(msgspec.json.encode(result) + b"\n")
    file.flush()
    if good:
        batch.request_counts.completed += 1
    else:
        batch.request_counts.failed += 1


def _expire(batch: KeptBatch, left: list[BatchLine | None], errors: BinaryIO) -> None:
    for line in left:
        if line is not None:
            result = failed(line.custom_id, "batch_expired", "the batch's time was over before this request's turn")
            _write(batch, result, errors, errors)


async def _cancel(tasks: Iterable[asyncio.Task[BatchResult]]) -> None:
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
