"""A file that is not complete yet: its bytes, and a journal of which of them are there."""

from __future__ import annotations

import hashlib
import os
import re
import threading
from pathlib import Path

from pagoda.deploy.download.failures import disk_failed
from pagoda.deploy.download.hub import RemoteFile

Span = tuple[int, int]
READ_BYTES = 2**20
_LINE = re.compile(rb"(\d+) (\d+)\n")


class Partial:
    """Named by the hash of the complete content: whichever source the rest is from, it is the same file.

    A span is written into the journal after its bytes are in the file, so a journal never promises too much, however
    the process ends. The hash follows the bytes that are there without a gap from the start.
    """

    def __init__(self, folder: Path, file: RemoteFile) -> None:
        self.file = file
        self.path = folder / (file.etag or f"unverified-{hashlib.sha256(file.path.encode()).hexdigest()}")
        self._journal_path = self.path.with_name(self.path.name + ".journal")
        self._lock = threading.Lock()
        self._hashing = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not file.etag:
                self._remove()
            self._open()
        except OSError as error:
            raise disk_failed(error, folder) from None

    def _open(self) -> None:
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._journal = os.open(self._journal_path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._spans: list[Span] = []
        size = min(os.fstat(self._fd).st_size, self.file.size)
        for match in _LINE.finditer(self._journal_path.read_bytes()):
            start, end = int(match[1]), int(match[2])
            if start < end <= size:
                self._spans = merged(self._spans, (start, end))
        self.resumed_bytes = self.done_bytes
        self._start_hash()

    def _start_hash(self) -> None:
        self._hashed = 0
        if self.file.git_sha1 and not self.file.sha256:
            self._hash = hashlib.sha1(b"blob %d\0" % self.file.size, usedforsecurity=False)
        else:
            self._hash = hashlib.sha256()

    @property
    def done_bytes(self) -> int:
        with self._lock:
            return sum(end - start for start, end in self._spans)

    def missing(self, start: int = 0, end: int | None = None) -> list[Span]:
        """The spans of [start, end) that are not there."""
        out, stop = [], self.file.size if end is None else end
        with self._lock:
            for have_start, have_end in self._spans:
                if start < have_start:
                    out.append((start, min(have_start, stop)))
                start = max(start, have_end)
                if start >= stop:
                    break
        return [span for span in (*out, (start, stop)) if span[0] < span[1]]

    def write(self, offset: int, data: bytes) -> None:
        """Keep these bytes, and hash on if nobody does."""
        try:
            view, at = memoryview(data), offset
            while view:
                count = os.pwrite(self._fd, view, at)
                view, at = view[count:], at + count
            os.write(self._journal, b"%d %d\n" % (offset, at))
        except OSError as error:
            raise disk_failed(error, self.path) from None
        with self._lock:
            self._spans = merged(self._spans, (offset, at))
        if self._hashing.acquire(blocking=False):
            try:
                self._hash_on()
            finally:
                self._hashing.release()

    def _hash_on(self) -> None:
        with self._lock:
            there = self._spans[0][1] if self._spans and self._spans[0][0] == 0 else 0
        while self._hashed < there:
            data = os.pread(self._fd, min(READ_BYTES, there - self._hashed), self._hashed)
            if not data:
                return
            self._hash.update(data)
            self._hashed += len(data)

    def digest(self) -> str:
        """The hash of the complete content."""
        with self._hashing:
            self._hash_on()
            return self._hash.hexdigest() if self._hashed == self.file.size else "(incomplete)"

    def seal(self) -> Path:
        """Bring the verified bytes to the disk; the file at the path that is returned is ready to be moved."""
        try:
            os.ftruncate(self._fd, self.file.size)
            os.fsync(self._fd)
        except OSError as error:
            raise disk_failed(error, self.path) from None
        return self.path

    def forget(self) -> None:
        """The file was moved, or the content is wrong: nothing of it is needed again."""
        self.close()
        self._remove()

    def restart(self) -> None:
        """Begin with nothing."""
        self.forget()
        self._open()

    def close(self) -> None:
        """Leave it for the next time."""
        for fd in (self._fd, self._journal):
            if fd >= 0:
                os.close(fd)
        self._fd = self._journal = -1

    def _remove(self) -> None:
        # The journal first: bytes without a journal are no danger, a journal without its bytes would be.
        self._journal_path.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)


def merged(spans: list[Span], new: Span) -> list[Span]:
    """The union, sorted, with no two spans that touch."""
    out: list[Span] = []
    for start, end in sorted([*spans, new]):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], end))
        else:
            out.append((start, end))
    return out
