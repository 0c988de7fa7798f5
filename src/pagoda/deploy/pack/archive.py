"""The file that a pack is: a shell script, and behind it a tar of all files; written in one pass, also in parts."""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from pagoda.deploy.pack.files import Member
from pagoda.errors import ConfigError, ModelError

SUMS = "SHA256SUMS"
_SCRIPT = "install.sh"
_BEGIN = b"#!/bin/sh\n# header "
_SELF_END = len(_BEGIN) + 64
"""What is before this byte holds the hash of what is behind it."""
_BLOCK = 4096
_CHUNK_BYTES = 1 << 20
_MOST_HEADER_BYTES = 1 << 20
_WHEN_S = 946_684_800  # one time for all files, so that the same files make the same pack
_VALUE = re.compile(r"\b([A-Z_]+)='([^']*)'")

Progress = Callable[[str, float, str], None]


@dataclass(frozen=True, slots=True)
class Part:
    """One file of a pack: what is in it behind the header."""

    path: Path
    sha256: str
    size: int


def part_path(out: Path, number: int, *, split: bool) -> Path:
    """Where part `number` (from 1 on) of the pack `out` is."""
    return out.with_name(f"{out.name}.{number:03}") if split else out


class Parts:
    """A file to write to that goes on in the next one when it is full, and hashes what is in each.

    The files have other names until `publish`: half a pack looks like none.
    """

    def __init__(self, out: Path, part_bytes: int | None, header_bytes: int) -> None:
        self._out, self._limit, self._header_bytes = out, part_bytes, header_bytes
        self._sizes: list[int] = []
        self._hashes = [hashlib.sha256()]
        self._file = self._next()
        self._file.write(bytes(header_bytes))

    def write(self, data: bytes) -> int:
        view = memoryview(data)
        while view.nbytes:
            used = self._sizes[-1] + (self._header_bytes if len(self._sizes) == 1 else 0)
            now = view if self._limit is None else view[: self._limit - used]
            if not now.nbytes:
                self._close()
                self._hashes.append(hashlib.sha256())
                self._file = self._next()
                continue
            self._file.write(now)
            self._hashes[-1].update(now)
            self._sizes[-1] += now.nbytes
            view = view[now.nbytes :]
        return len(data)

    def tell(self) -> int:
        return sum(self._sizes)

    def parts(self) -> list[Part]:
        return [Part(self._path(i + 1), self._hashes[i].hexdigest(), size) for i, size in enumerate(self._sizes)]

    def publish(self, header: bytes) -> None:
        """Write the header, and give the files their names, the first one last."""
        if len(header) != self._header_bytes:
            raise ValueError("the header has another size than was reserved for it")
        self._close()
        with self._hidden(1).open("r+b") as file:
            file.write(header)
            os.fsync(file.fileno())
        for number in range(len(self._sizes), 0, -1):
            os.rename(self._hidden(number), self._path(number))

    def discard(self) -> None:
        """Take away what was not published."""
        self._file.close()
        for number in range(1, len(self._sizes) + 1):
            self._hidden(number).unlink(missing_ok=True)

    def _next(self) -> BinaryIO:
        self._sizes.append(0)
        return self._hidden(len(self._sizes)).open("wb")

    def _close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def _path(self, number: int) -> Path:
        return part_path(self._out, number, split=self._limit is not None)

    def _hidden(self, number: int) -> Path:
        path = self._path(number)
        return path.with_name(f".{path.name}.partial")


class Tar:
    """Writes members, and remembers what SHA256SUMS and the manifest will say of them."""

    def __init__(self, parts: Parts, total_bytes: int, progress: Progress) -> None:
        # Names and sizes in GNU's form: every tar reads them, busybox's too.
        self._tar = tarfile.open(
            fileobj=parts,
            mode="w",
            format=tarfile.GNU_FORMAT,
            copybufsize=_CHUNK_BYTES,  # type: ignore[call-overload]
        )
        self._total_bytes, self._done_bytes, self._progress = total_bytes, 0, progress
        self.files: list[tuple[str, int, str]] = []

    def add(self, member: Member) -> None:
        size = member.size
        with member.source.open("rb") as file:
            reader = _Hashed(file, size, lambda count: self._tell(member.path, count))
            self._tar.addfile(_entry(member.path, size, member.executable), reader)
        found = reader.hash.hexdigest()
        if reader.left:
            raise ModelError(f"{member.source} became shorter while it was packed", remedy="Pack it again")
        if member.sha256 not in (None, found):
            raise ConfigError(
                f"{member.source} is not the file that its package brought", remedy="Install the package again, by pip"
            )
        self.files.append((member.path, size, found))

    def add_text(self, path: str, text: str, *, executable: bool = False) -> None:
        data = text.encode()
        self._tar.addfile(_entry(path, len(data), executable), BytesIO(data))
        self.files.append((path, len(data), hashlib.sha256(data).hexdigest()))

    def add_sums(self) -> tuple[str, int]:
        """Write the last member; its hash, and of how many files it tells."""
        text = "".join(f"{sha256}  {path}\n" for path, _, sha256 in self.files)
        count = len(self.files)
        self.add_text(SUMS, text)
        self._tar.close()
        return self.files[-1][2], count

    def _tell(self, path: str, count: int) -> None:
        self._done_bytes += count
        self._progress("pack", self._done_bytes / max(1, self._total_bytes), path.rpartition("/")[2])


class _Hashed:
    """A file that is hashed while it is read."""

    def __init__(self, file: BinaryIO, size: int, tell: Callable[[int], None]) -> None:
        self._file, self._tell, self.left, self.hash = file, tell, size, hashlib.sha256()

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        if data:
            self.left -= len(data)
            self.hash.update(data)
            self._tell(len(data))
            return data
        return bytes(size)  # the tar stays one, and `left` tells


def _entry(path: str, size: int, executable: bool) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(path)
    entry.size, entry.mode, entry.mtime = size, 0o755 if executable else 0o644, _WHEN_S
    return entry


def header_bytes(most_parts: int) -> int:
    """Room for the script and the table of its parts."""
    script = Path(__file__).with_name(_SCRIPT).stat().st_size
    return -(-(script + 1024 + 100 * most_parts) // _BLOCK) * _BLOCK


def header(values: Mapping[str, str], parts: list[Part], room_bytes: int) -> bytes:
    """The script with all it must know."""
    text = Path(__file__).with_name(_SCRIPT).read_text("utf-8")
    table = "\n".join(f"{part.sha256} {part.size}" for part in parts)
    for name, value in {**values, "HEADER_BYTES": str(room_bytes), "PARTS": table}.items():
        text = text.replace(f"@{name}@", value, 1)
    data = text.replace("@SELF@", "0" * 64, 1).encode()
    data += b"\n" * (room_bytes - len(data))
    own = hashlib.sha256(data[_SELF_END:]).hexdigest().encode()
    return _BEGIN + own + data[_SELF_END:]


def check(path: Path, progress: Progress) -> Mapping[str, str]:
    """Read a whole pack; what its header says. ModelError where a byte is not what it was when it was written."""
    values, parts = read_header(path)
    room, total = int(values["HEADER_BYTES"]), sum(part.size for part in parts)
    for number, part in enumerate(parts):
        size = part.size + (0 if number else room)
        if not part.path.is_file():
            raise ModelError(f"{part.path} is missing", remedy="All parts are needed, in one folder")
        if part.path.stat().st_size != size:
            raise ModelError(f"{part.path} has {part.path.stat().st_size} bytes, not {size}", remedy="Copy it again")
    done = 0
    for number, part in enumerate(parts):
        hashed = hashlib.sha256()
        for chunk in _chunks(part.path, 0 if number else room):
            hashed.update(chunk)
            done += len(chunk)
            progress("check", done / max(1, total), part.path.name)
        if hashed.hexdigest() != part.sha256:
            raise ModelError(f"{part.path} is damaged", remedy="Copy it again")
    return values


def read_header(path: Path) -> tuple[Mapping[str, str], list[Part]]:
    """What the header of a pack says, and its parts; nothing of it is run."""
    with path.open("rb") as file:
        data = file.read(_MOST_HEADER_BYTES)
    text = data[:_MOST_HEADER_BYTES].partition(b'\nmain "$@"\n')[0].decode("utf-8", "replace")
    values = dict(_VALUE.findall(text[: text.find("usage()")]))
    try:
        room, split = int(values["HEADER_BYTES"]), values["SPLIT"] == "1"
        rows = [line.split() for line in values["PARTS"].split("\n")]
        out = path.with_name(path.name.removesuffix(".001")) if split else path
        parts = [
            Part(path if i == 0 else part_path(out, i + 1, split=split), sha256, int(size))
            for i, (sha256, size) in enumerate(rows)
        ]
    except (KeyError, ValueError):
        raise ModelError(f"{path} is no pack, or its beginning is damaged", remedy="Name the first file") from None
    if data[:_SELF_END] != _BEGIN + hashlib.sha256(data[_SELF_END:room]).hexdigest().encode():
        raise ModelError(f"the beginning of {path} is damaged", remedy="Copy it again")
    return values, parts


def _chunks(path: Path, start: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk
