"""Uploaded files and results, in a folder of this server: bounded, written whole or not at all."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import time
from pathlib import Path
from typing import BinaryIO

from pagoda.api.batch.protocol import KeptFile, is_of
from pagoda.api.serving.kept import META, TEMPORARY, load_all, removed_on_error, write_whole
from pagoda.errors import ConfigError, NotFound, TooLarge

MAX_FILE_BYTES = 200 << 20
MAX_TOTAL_BYTES = 4 << 30
MAX_FILES = 10_000


class FileStore:
    """Content and description of each file lie side by side; only names that were made here ever become a path."""

    def __init__(self, folder: str, *, max_total_bytes: int = MAX_TOTAL_BYTES, max_files: int = MAX_FILES) -> None:
        self.folder = Path(folder)
        self._files = self.folder / "files"
        self._max_total_bytes = max_total_bytes
        self._max_files = max_files
        try:
            self._files.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = (self.folder / "lock").open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"--files-dir {folder} is in use by another server", remedy="Give each server a folder of its own"
            ) from None
        except OSError as error:
            raise ConfigError(
                f"--files-dir {folder} can't be written: {error.strerror}", remedy="Name a folder that this user owns"
            ) from None
        self._known = load_all(self._files, KeptFile)
        for path in self._files.iterdir():
            if path.suffix != META and path.name not in self._known:
                path.unlink()  # an upload that was never finished
        for file_id in [each for each in self._known if not (self._files / each).exists()]:
            self.delete(file_id)  # `keep` came no further than the description

    def close(self) -> None:
        """Let another server have the folder."""
        self._lock.close()

    def list(self, owner: str | None = None) -> list[KeptFile]:
        """Those that the owner may see, the latest first."""
        known = [each for each in tuple(self._known.values()) if is_of(each, owner)]
        return sorted(known, key=lambda each: (each.created_at, each.id), reverse=True)

    def find(self, file_id: str, owner: str | None = None) -> KeptFile | None:
        found = self._known.get(file_id)
        return found if found is not None and is_of(found, owner) else None

    def get(self, file_id: str, owner: str | None = None) -> KeptFile:
        found = self.find(file_id, owner)
        if found is None:
            raise NotFound(f"there is no file {file_id[:80]!r} here", param="file_id")
        return found

    def path(self, file_id: str) -> Path:
        return self._files / self.get(file_id).id

    def check_room(self, size_bytes: int) -> None:
        """Raise TooLarge unless a file of this size may be kept."""
        held = sum(each.bytes for each in tuple(self._known.values()))
        if size_bytes > MAX_FILE_BYTES:
            raise TooLarge(f"a file may hold {MAX_FILE_BYTES >> 20} MiB", remedy="Split it", param="file")
        if held + size_bytes > self._max_total_bytes or len(self._known) >= self._max_files:
            raise TooLarge(
                f"the files here may hold {self._max_total_bytes >> 20} MiB and be {self._max_files} in number",
                remedy="Delete some with DELETE /v1/files/{id}",
                param="file",
            )

    def copy_in(self, content: BinaryIO, file_id: str) -> None:
        """Take a copy of a content, which `keep` then makes a file."""
        path = self._files / (file_id + TEMPORARY)
        with removed_on_error(path), path.open("wb") as out:
            shutil.copyfileobj(content, out)

    def keep(self, source: Path | None, filename: str, purpose: str, file_id: str, owner: str = "") -> KeptFile:
        """Make a file of what was copied in, or of a file of this folder's file system, which is moved."""
        path = self._files / file_id
        copied = path.with_name(file_id + TEMPORARY)
        size_bytes = (source or copied).stat().st_size
        now = int(time.time())
        made = KeptFile(id=file_id, bytes=size_bytes, created_at=now, filename=filename, purpose=purpose, owner=owner)
        with removed_on_error(copied):
            # The description first: a crash between leaves a source that is moved again.
            write_whole(path.with_name(file_id + META), made)
            os.replace(source or copied, path)
        self._known[file_id] = made
        return made

    def delete(self, file_id: str) -> None:
        path = self.path(file_id)
        path.with_name(path.name + META).unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        del self._known[file_id]


def new_file_id() -> str:
    return f"file-{secrets.token_hex(12)}"
