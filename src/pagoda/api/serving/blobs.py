"""Files that clients put on the server's disk by their digest, to make models of."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import BinaryIO

from pagoda.api.serving.kept import TEMPORARY, DiskFull, removed_on_error
from pagoda.errors import BadRequest, Overloaded

MAX_BLOB_BYTES = 1 << 40
MAX_UPLOADS = 2
ROOM_LEFT_BYTES = 1 << 30
STALE_S = 3600.0
_DIGEST = re.compile(r"sha256[:-]([0-9a-f]{64})", re.ASCII)
_WRITE_BYTES = 4 << 20


class BlobStore:
    """A blob is whole and has the digest that is its name, or is not there. Only that name ever becomes a path."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._uploads = 0

    def find(self, digest: str) -> Path | None:
        path = self._path(digest)
        return path if path.is_file() else None

    async def take(self, digest: str, parts: AsyncIterator[bytes], claimed_bytes: int) -> None:
        """Keep what comes. Raises a PagodaError, and keeps nothing, where that is not what the digest says."""
        path = self._path(digest)
        if self._uploads >= MAX_UPLOADS:
            raise Overloaded(f"{MAX_UPLOADS} files are being sent already", remedy="Wait for one of them")
        self._uploads += 1
        try:
            await asyncio.to_thread(self._make_room, claimed_bytes)
            temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}{TEMPORARY}")
            with removed_on_error(temporary):
                descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
                with os.fdopen(descriptor, "wb") as out:
                    found = await self._written(out, parts)
                if found != path.name.removeprefix("sha256-"):
                    raise BadRequest(
                        f"the file's digest is sha256:{found}, not what the path says", remedy="Send it again"
                    )
                os.replace(temporary, path)
        finally:
            self._uploads -= 1

    async def _written(self, out: BinaryIO, parts: AsyncIterator[bytes]) -> str:
        """The digest of all that came, which is on the disk then."""
        digest, held = hashlib.sha256(), bytearray()

        def write() -> None:
            digest.update(held)
            out.write(held)
            held.clear()

        async for part in parts:
            held += part
            if len(held) >= _WRITE_BYTES:
                await asyncio.to_thread(write)
                await asyncio.to_thread(self._make_room, 0)

        def settle() -> None:
            write()
            out.flush()
            os.fsync(out.fileno())

        await asyncio.to_thread(settle)
        return digest.hexdigest()

    def _make_room(self, size_bytes: int) -> None:
        """The folder, without what uploads left that a crash ended. DiskFull where the disk would fill up."""
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            free = shutil.disk_usage(self._folder).free
        except OSError as error:
            raise DiskFull(f"files can't be stored: {error.strerror}", remedy="Set PAGODA_CACHE to a folder") from None
        if size_bytes + ROOM_LEFT_BYTES > free:
            raise DiskFull(
                f"the disk has {free >> 20} MiB free, and {ROOM_LEFT_BYTES >> 20} MiB of it stay free",
                remedy="Remove models that are not needed: pagoda list, pagoda rm NAME",
            )
        old_s = time.time() - STALE_S
        for path in self._folder.glob("*" + TEMPORARY) if size_bytes else ():
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < old_s:
                    path.unlink()

    def _path(self, digest: str) -> Path:
        match = _DIGEST.fullmatch(digest)
        if match is None:
            raise BadRequest("a digest is sha256: and 64 hexadecimal digits in small letters", param="digest")
        return self._folder / f"sha256-{match[1]}"
