"""Fetches the bytes of many files at once: ranges in parallel, tries again, notices stalls, verifies each hash."""

from __future__ import annotations

import http.client
import queue
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from pagoda.deploy.download.failures import SourceFailed, Unreachable
from pagoda.deploy.download.fetch import BROKEN, MAX_WAIT_S, TryLater, reason, request
from pagoda.deploy.download.hub import Listing, RemoteFile
from pagoda.deploy.download.partial import Partial, Span

CHUNK_BYTES = 2**18
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


@dataclass(frozen=True, slots=True)
class Pace:
    """How many connections, how they are shared, and how long to be patient."""

    connections: int = 8
    part_bytes: int = 64 * 2**20
    tries: int = 6
    first_wait_s: float = 0.5
    timeout_s: float = 15.0
    stall_s: float = 30.0
    stall_bytes_per_s: float = 10_000.0


@dataclass
class Progress:
    """Bytes of the whole pull; `bytes_got` are those that came over the network now."""

    total_bytes: int = 0
    done_bytes: int = 0
    bytes_got: int = 0


Show = Callable[[Progress], None]
Store = Callable[[Partial], None]


@dataclass
class _Job:
    """One file. `whole`: the hub ignores ranges, so one thread reads it from the start."""

    partial: Partial
    open_parts: int = 0
    whole: threading.Lock = field(default_factory=threading.Lock)
    refetched: bool = False


class Transfer:
    """Files of one listing into partial files; `store` gets each as soon as its hash is right."""

    def __init__(self, listing: Listing, store: Store, pace: Pace, progress: Progress, show: Show) -> None:
        self._listing, self._store, self._pace = listing, store, pace
        self._progress, self._show = progress, show
        self._parts: queue.SimpleQueue[tuple[_Job, Span] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._left = 0
        self._failure: Exception | None = None
        self._open: list[_Job] = []
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._not_before_s = 0.0

    def run(self, files: Iterable[RemoteFile], folder: Path) -> None:
        """Fetch and store them all; the first failure ends it. What was fetched stays in `folder`."""
        waiting = deque(files)
        self._left = len(waiting)
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(self._pace.connections)]
        try:
            for thread in threads:
                thread.start()
            while self._left and not self._stop.is_set():
                # Each open file has two descriptors, and a process may have few of them.
                while waiting and len(self._open) < 4 * self._pace.connections:
                    self._begin(Partial(folder, waiting.popleft()))
                self._show(self._progress)
                self._wake.wait(0.1)
                self._wake.clear()
        finally:
            self._stop.set()
            for _ in threads:
                self._parts.put(None)
            for thread in threads:
                thread.join()
            for job in self._open:
                job.partial.close()
        self._show(self._progress)
        if self._failure is not None:
            raise self._failure

    def _begin(self, partial: Partial) -> None:
        job = _Job(partial)
        with self._lock:
            self._open.append(job)
        self._count(partial.resumed_bytes)
        self._plan(job)

    def _plan(self, job: _Job) -> None:
        """Queue the missing spans, in parts. A complete file gets an empty one, so that it is verified as well."""
        step = self._pace.part_bytes
        spans = [(at, min(at + step, end)) for start, end in job.partial.missing() for at in range(start, end, step)]
        job.open_parts = max(1, len(spans))
        for span in spans or [(0, 0)]:
            self._parts.put((job, span))

    def _work(self) -> None:
        while (item := self._parts.get()) is not None and not self._stop.is_set():
            job, span = item
            try:
                self._fetch(job, span)
                with self._lock:
                    job.open_parts -= 1
                    last = job.open_parts == 0
                if last and not self._stop.is_set():
                    self._finish(job)
            except Exception as error:
                with self._lock:
                    self._failure = self._failure or error
                self._stop.set()
                self._wake.set()

    def _finish(self, job: _Job) -> None:
        partial, file = job.partial, job.partial.file
        digest = partial.digest()
        if file.etag and digest != file.etag:
            again = partial.resumed_bytes > 0 and not job.refetched
            self._count(-partial.done_bytes)
            if again:
                partial.restart()
            else:
                partial.forget()
                raise SourceFailed(
                    f"{file.path} from {self._listing.source.name} is not the file that was announced: "
                    f"its hash is {digest}, not {file.etag}",
                    remedy="Nothing of it was kept. Name another source: --source modelscope or --source huggingface",
                )
            job.refetched = True
            self._plan(job)
            return
        self._store(partial)
        with self._lock:
            self._open.remove(job)
            self._left -= 1
        self._wake.set()

    def _fetch(self, job: _Job, span: Span) -> None:
        """Get what is missing in the span; only tries that bring nothing are counted."""
        failed = 0
        while (missing := job.partial.missing(*span)) and not self._stop.is_set():
            before = job.partial.done_bytes
            wait_s = None
            try:
                self._wait(self._not_before_s - time.monotonic())
                self._get(job, missing[0])
                continue
            except TryLater as error:
                why, wait_s = str(error), error.wait_s
            except BROKEN as error:
                why = reason(error)
            failed = 1 if job.partial.done_bytes > before else failed + 1
            if failed >= self._pace.tries:
                raise Unreachable(f"{self._listing.source.name} does not give {job.partial.file.path}: {why}")
            if wait_s is not None:
                # The hub means all connections.
                self._not_before_s = time.monotonic() + min(wait_s, MAX_WAIT_S)
            else:
                self._wait(self._pace.first_wait_s * 2 ** (failed - 1))

    def _wait(self, seconds: float) -> None:
        if seconds > 0:
            self._stop.wait(seconds)

    def _get(self, job: _Job, span: Span) -> None:
        file = job.partial.file
        ranged = span != (0, file.size)
        with self._request(file, span if ranged else None) as answer:
            if answer.headers.get("Content-Encoding", "identity") != "identity":
                raise SourceFailed(f"{self._listing.source.name} compresses {file.path}, which was not asked for")
            if answer.status == 206:
                _check_range(answer, span, file)
                self._read(job, answer, *span)
                return
            if not ranged:
                self._read(job, answer, *span)
                return
        # Ranges are ignored: one connection reads all of it, the others wait and find nothing missing.
        with job.whole:
            if job.partial.missing(*span):
                with self._request(file, None) as answer:
                    self._read(job, answer, 0, file.size)

    def _request(self, file: RemoteFile, span: Span | None) -> http.client.HTTPResponse:
        return request(self._listing.source.endpoint, self._listing.url(file), span, self._pace.timeout_s)

    def _read(self, job: _Job, answer: http.client.HTTPResponse, at: int, end: int) -> None:
        """Copy the body, which begins at `at`, to the file."""
        window_s, window_at = time.monotonic(), at
        while at < end and not self._stop.is_set():
            data = _some(answer, min(CHUNK_BYTES, end - at))
            if not data:
                raise ConnectionError(f"the connection was cut {end - at} bytes before the end")
            for start, stop in job.partial.missing(at, at + len(data)):
                job.partial.write(start, data[start - at : stop - at])
                self._count(stop - start, got=stop - start)
            at += len(data)
            elapsed_s = time.monotonic() - window_s
            if elapsed_s >= self._pace.stall_s:
                if (at - window_at) / elapsed_s < self._pace.stall_bytes_per_s:
                    raise ConnectionError("the connection is as good as stalled")
                window_s, window_at = time.monotonic(), at

    def _count(self, done: int, got: int = 0) -> None:
        with self._lock:
            self._progress.done_bytes += done
            self._progress.bytes_got += got


def _some(answer: http.client.HTTPResponse, limit: int) -> bytes:
    """Up to `limit` bytes: what comes in a moment. What is held here is lost if the process is killed."""
    parts: list[bytes] = []
    until_s = time.monotonic() + 0.05
    try:
        while limit > 0 and time.monotonic() < until_s and (data := answer.read1(limit)):
            parts.append(data)
            limit -= len(data)
    except BROKEN:
        # What came before is good; the next read fails again.
        if not parts:
            raise
    return b"".join(parts)


def _check_range(answer: http.client.HTTPResponse, span: Span, file: RemoteFile) -> None:
    match = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
    if match is None or (int(match[1]), int(match[2]) + 1) != span or match[3] not in ("*", str(file.size)):
        raise ConnectionError(f"the hub answers with other bytes than those asked for ({match and match[0]})")
