"""What a program or shared library (an ELF file) needs from the machine that loads it."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pagoda.errors import ConfigError

MACHINES = {62: "x86_64", 183: "aarch64"}
"""Numbers of processors in ELF files, with the names that `uname -m` gives them."""

_LOAD, _DYNAMIC = 1, 2
_NEEDED, _STRTAB, _STRSZ, _RPATH, _RUNPATH, _VERNEED, _VERNEEDNUM = 1, 5, 10, 15, 29, 0x6FFFFFFE, 0x6FFFFFFF
_MOST_BYTES, _FARTHEST = 1 << 24, 1 << 40
_MOST_VERSIONS = 10_000
_GLIBC = re.compile(r"GLIBC_(\d+)\.(\d+)")


@dataclass(frozen=True, slots=True)
class Elf:
    """`needed`: the libraries it is linked to. `paths`: where it looks for them. `glibc`: the oldest that will do."""

    machine: str
    needed: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    glibc: tuple[int, int] = (0, 0)


def read_elf(path: Path) -> Elf | None:
    """The facts of a 64-bit little-endian ELF file; None for any other file."""
    with path.open("rb") as file:
        head = file.read(64)
        if len(head) < 64 or head[:6] != b"\x7fELF\x02\x01":
            return None
        try:
            return _read(file, head)
        except (struct.error, ValueError, KeyError, OverflowError):
            raise ConfigError(f"{path} is a damaged program file", remedy="Install its package again") from None


def _read(file: BinaryIO, head: bytes) -> Elf:
    (machine,), (at,) = struct.unpack_from("<H", head, 18), struct.unpack_from("<Q", head, 32)
    size, count = struct.unpack_from("<HH", head, 54)
    segments = [struct.unpack_from("<IIQQQQ", _bytes(file, at + i * size, size)) for i in range(count)]
    name = MACHINES.get(machine, f"processor {machine}")
    dynamic = next((one for one in segments if one[0] == _DYNAMIC), None)
    if dynamic is None:
        return Elf(name)
    entries = list(struct.iter_unpack("<qQ", _bytes(file, dynamic[2], dynamic[5] & ~15)))
    table = dict(entries)

    def place(address: int) -> int:
        for kind, _, offset, start, _, length in segments:
            if kind == _LOAD and start <= address < start + length:
                return int(address - start + offset)
        raise ValueError(address)

    strings = _bytes(file, place(table[_STRTAB]), table[_STRSZ])
    needed = tuple(_text(strings, value) for tag, value in entries if tag == _NEEDED)
    paths = [part for tag in (_RPATH, _RUNPATH) if tag in table for part in _text(strings, table[tag]).split(":")]
    versions = _versions(file, place(table[_VERNEED]), table[_VERNEEDNUM], strings) if _VERNEED in table else []
    asked = [(int(found[1]), int(found[2])) for version in versions if (found := _GLIBC.match(version))]
    return Elf(name, needed, tuple(filter(None, paths)), max(asked, default=(0, 0)))


def _versions(file: BinaryIO, at: int, count: int, strings: bytes) -> list[str]:
    """The names of all versions of symbols that it asks other libraries for."""
    out: list[str] = []
    for _ in range(count):
        _, names, _, first, following = struct.unpack("<HHIII", _bytes(file, at, 16))
        if len(out) + names > _MOST_VERSIONS or not names:
            raise ValueError(names)
        entry = at + first
        for _ in range(names):
            _, _, _, name, step = struct.unpack("<IHHII", _bytes(file, entry, 16))
            out.append(_text(strings, name))
            entry += step
        at += following
    return out


def _bytes(file: BinaryIO, at: int, size: int) -> bytes:
    if size > _MOST_BYTES or at > _FARTHEST:
        raise OverflowError
    file.seek(at)
    return file.read(size)


def _text(strings: bytes, at: int) -> str:
    return strings[at : strings.index(b"\0", at)].decode()
