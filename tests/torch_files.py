"""Writes files in torch's zip format by hand, so that any byte of them can be wrong."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + len(raw).to_bytes(4, "little") + raw


def number(value: int) -> bytes:
    return b"J" + value.to_bytes(4, "little", signed=True)


def numbers(*values: int) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def storage(key: str = "0", kind: str = "FloatStorage", elements: int = 6) -> bytes:
    return b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu") + number(elements) + b"tQ"


def tensor(shape: bytes, strides: bytes, offset: int = 0, of: bytes | None = None) -> bytes:
    made = b"ctorch._utils\n_rebuild_tensor_v2\n(" + (storage() if of is None else of) + number(offset)
    return made + shape + strides + b"\x89" + b"ccollections\nOrderedDict\n)RtR"


def table(**entries: bytes) -> bytes:
    items = b"".join(text(name) + value for name, value in entries.items())
    return b"\x80\x02}(" + items + b"u."


GOOD = table(a=tensor(numbers(2, 3), numbers(3, 1)))
DATA = {"data/0": bytes(range(24))}


def write(path: Path, pickle: bytes = GOOD, files: Mapping[str, bytes] = DATA, *, compressed: bool = False) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", pickle)
        for name, data in files.items():
            archive.writestr(f"archive/{name}", data)
    return path
