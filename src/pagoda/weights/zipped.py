"""Zip archives whose files are stored as they are: where each one lies, so that it can be mapped."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from pagoda.weights.files import MappedFile

_END, _END64, _LOCATOR, _ENTRY, _LOCAL = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07", b"PK\x01\x02", b"PK\x03\x04"
_LONGEST_END = 22 + 65535
_MAX_ENTRIES = 1 << 18
_FULL32 = 0xFFFFFFFF
_ENCRYPTED = 1


class NotZip(Exception):
    """Why the archive is refused."""


def stored_files(file: MappedFile) -> dict[str, tuple[int, int]]:
    """Begin and end of each file's bytes. Compressed or encrypted files, and damage, raise NotZip."""
    count, begin, size = _directory(file)
    if begin + size > file.size:
        raise NotZip("its directory lies behind its end: it is truncated")
    if count > _MAX_ENTRIES or count * 46 > size:
        raise NotZip(f"its directory cannot hold {count} files")
    found: dict[str, tuple[int, int]] = {}
    for name, place in _entries(file, file.raw[begin : begin + size], count):
        if name in found:
            raise NotZip(f"it has two files {name}")
        found[name] = place
    return found


def _directory(file: MappedFile) -> tuple[int, int, int]:
    """How many files there are, and where their directory begins and how long it is."""
    at = file.raw.rfind(_END, max(0, file.size - _LONGEST_END))
    if at < 0 or at + 22 > file.size:
        raise NotZip("it has no directory at its end: it is truncated")
    count, size, begin = struct.unpack_from("<HII", file.raw, at + 10)
    if at < 20 or file.raw[at - 20 : at - 16] != _LOCATOR:
        return count, begin, size
    (at,) = struct.unpack_from("<Q", file.raw, at - 12)
    if at + 56 > file.size or file.raw[at : at + 4] != _END64:
        raise NotZip("its directory is damaged")
    count, size, begin = struct.unpack_from("<QQQ", file.raw, at + 32)
    return count, begin, size


def _entries(file: MappedFile, directory: bytes, count: int) -> Iterator[tuple[str, tuple[int, int]]]:
    at = 0
    for _ in range(count):
        if at + 46 > len(directory) or directory[at : at + 4] != _ENTRY:
            raise NotZip("its directory is damaged")
        flags, method = struct.unpack_from("<HH", directory, at + 8)
        packed, size, name_length, extra_length, comment_length = struct.unpack_from("<IIHHH", directory, at + 20)
        (begin,) = struct.unpack_from("<I", directory, at + 42)
        name = directory[at + 46 : at + 46 + name_length].decode(errors="replace")
        extra = directory[at + 46 + name_length : at + 46 + name_length + extra_length]
        size, packed, begin = _long(extra, [size, packed, begin])
        if method or flags & _ENCRYPTED or packed != size:
            raise NotZip(f"{name[:80]} in it is compressed or encrypted, which PyTorch never does")
        yield name, _data(file, name, begin, size)
        at += 46 + name_length + extra_length + comment_length


def _long(extra: bytes, values: list[int]) -> list[int]:
    """Sizes of 4 GiB and more stand in an extra field, in this order, those that need it only."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            field = extra[at + 4 : at + 4 + length]
            for i, value in enumerate(values):
                if value == _FULL32:
                    if len(field) < 8:
                        raise NotZip("its directory is damaged")
                    values[i], field = int.from_bytes(field[:8], "little"), field[8:]
            break
        at += 4 + length
    return values


def _data(file: MappedFile, name: str, begin: int, size: int) -> tuple[int, int]:
    if begin + 30 > file.size or file.raw[begin : begin + 4] != _LOCAL:
        raise NotZip(f"{name[:80]} in it is not where its directory says")
    name_length, extra_length = struct.unpack_from("<HH", file.raw, begin + 26)
    start = begin + 30 + name_length + extra_length
    if start + size > file.size:
        raise NotZip(f"{name[:80]} in it ends at {start + size} of {file.size} bytes: it is truncated")
    return start, start + size
