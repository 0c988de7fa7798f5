"""Batches and what they have so far, on disk beside their files: a server that starts again goes on with them."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import threading
import time
from pathlib import Path
from typing import Literal, get_args

from pagoda.api.batch.file_store import FileStore
from pagoda.api.batch.protocol import KeptBatch, RequestCounts, Status, is_of
from pagoda.api.serving.kept import load_all, write_whole
from pagoda.errors import NotFound, TooLarge

MAX_BATCHES = 1000
Kind = Literal["output", "errors"]


class BatchStore:
    """`changed` is set when there may be something to do: a new batch, or one to cancel."""

    def __init__(self, files: FileStore) -> None:
        self.files = files
        self.changed = asyncio.Event()
        self._folder = files.folder / "batches"
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self._batches = load_all(self._folder, KeptBatch)
        self._writing = threading.Lock()

    def list(self, owner: str | None = None) -> list[KeptBatch]:
        """Those that the owner may see, the latest first."""
        known = [each for each in tuple(self._batches.values()) if is_of(each, owner)]
        return sorted(known, key=lambda each: (each.created_at, each.id), reverse=True)

    def get(self, batch_id: str, owner: str | None = None) -> KeptBatch:
        found = self._batches.get(batch_id)
        if found is None or not is_of(found, owner):
            raise NotFound(f"there is no batch {batch_id[:80]!r} here", param="batch_id")
        return found

    def create(
        self,
        endpoint: str,
        input_file_id: str,
        window: str,
        window_s: int,
        metadata: dict[str, str],
        owner: str = "",
    ) -> KeptBatch:
        """A batch that waits for its turn. Old ones that are over are forgotten when there are too many."""
        over = [each for each in self.list() if each.is_over]
        if len(self._batches) >= MAX_BATCHES and not over:
            raise TooLarge(f"{MAX_BATCHES} batches are waiting; more are not taken now")
        for each in over[max(0, MAX_BATCHES - 1 - (len(self._batches) - len(over))) :]:
            self._state(each.id).unlink()
            del self._batches[each.id]
            for kind in get_args(Kind):
                self.part(each, kind).unlink(missing_ok=True)
        now = int(time.time())
        batch = KeptBatch(
            id=f"batch_{secrets.token_hex(12)}",
            endpoint=endpoint,
            input_file_id=input_file_id,
            completion_window=window,
            created_at=now,
            expires_at=now + window_s,
            request_counts=RequestCounts(),
            metadata=metadata or None,
            owner=owner,
        )
        self._save(batch)
        self._batches[batch.id] = batch
        return batch

    def next(self) -> KeptBatch | None:
        """The oldest one that is not over."""
        return next((each for each in reversed(self.list()) if not each.is_over), None)

    async def enter(self, batch: KeptBatch, status: Status) -> None:
        """Change its state, with the time of that; it is written beside the event loop."""
        batch.status = status
        if status != "validating":
            setattr(batch, f"{status}_at", int(time.time()))
        await asyncio.to_thread(self._save, batch)

    def _save(self, batch: KeptBatch) -> None:
        with self._writing:  # whoever is last has the latest
            write_whole(self._state(batch.id), batch)

    def part(self, batch: KeptBatch, kind: Kind) -> Path:
        """Where the results so far are."""
        return self._folder / f"{batch.id}.{kind}.jsonl"

    def publish(self, batch: KeptBatch, kind: Kind) -> str | None:
        """Make a file of the results; its id. Doing it twice, with a crash between, gives the same file."""
        file_id = "file-" + hashlib.sha256(f"{batch.id} {kind}".encode()).hexdigest()[:24]
        part = self.part(batch, kind)
        if self.files.find(file_id) is None:
            if not part.exists() or part.stat().st_size == 0:
                part.unlink(missing_ok=True)
                return None
            self.files.keep(part, f"{batch.id}_{kind}.jsonl", "batch_output", file_id, batch.owner)
        return file_id

    def _state(self, batch_id: str) -> Path:
        return self._folder / f"{batch_id}.json"
