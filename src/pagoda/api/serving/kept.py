"""What the server keeps on disk for its clients, one struct a file: written whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import msgspec

from pagoda.errors import PagodaError

TEMPORARY = ".tmp"
META = ".json"

T = TypeVar("T", bound=msgspec.Struct)


class DiskFull(PagodaError):
    """Nothing more can be stored now."""

    status = 507
    code = "insufficient_storage"


def write_whole(path: Path, value: msgspec.Struct) -> None:
    """Replace a file's content so that a crash leaves the old or the new one."""
    temporary = path.with_name(path.name + TEMPORARY)
    with removed_on_error(temporary):
        with temporary.open("wb") as out:
            out.write(msgspec.json.encode(value))
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, path)


@contextlib.contextmanager
def removed_on_error(path: Path) -> Iterator[None]:
    """A disk that is full must not keep half a file. Raises DiskFull for what the system refuses to write."""
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise disk_full(error) from error
        raise


def disk_full(error: OSError) -> DiskFull:
    return DiskFull(
        f"the file can't be stored: {error.strerror}",
        remedy="Give the server's disk more room, or delete files with DELETE /v1/files/{id}",
    )


def load_all(folder: Path, kind: type[T]) -> dict[str, T]:
    """The structs in a folder's JSON files by the files' names; what is broken is left out."""
    found = {}
    for path in folder.glob("*" + META):
        with contextlib.suppress(OSError, msgspec.DecodeError):
            found[path.stem] = msgspec.json.decode(path.read_bytes(), type=kind)
    return found
