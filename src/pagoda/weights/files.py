"""Files of a checkpoint: what they are by their first bytes, mapped read-only, and gathered as one source."""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pagoda.errors import ModelError
from pagoda.weights.grouped import MadeTensor
from pagoda.weights.source import Tensor

Kind = Literal["gguf", "safetensors", "torch", "pointer", "pickle", "old", "answer", "empty", "other"]

DOWNLOAD_AGAIN = "Download it again"
SAVE_AGAIN = (
    "Save it again where PyTorch is: torch.save(torch.load(FILE, weights_only=True), FILE); or take the model's "
    "safetensors version"
)

_MAGICS: tuple[tuple[bytes, Kind], ...] = (
    (b"GGUF", "gguf"),
    (b"version https://git-lfs", "pointer"),
    (b"PK\x03\x04", "torch"),
    (b"lmgg", "old"),
    (b"fmgg", "old"),
    (b"tjgg", "old"),
    (b'{"error', "answer"),
)
_WEAK_MAGICS: tuple[tuple[bytes, Kind], ...] = ((b"\x80", "pickle"), (b"<", "answer"))  # may begin a safetensors file

_WRONG: dict[Kind, tuple[str, str]] = {
    "pointer": ("is a git-lfs pointer, not the file itself", "Run `git lfs pull` in its folder, or download the file"),
    "torch": ("is a PyTorch file, which is not expected here", "Give it the name pytorch_model.bin"),
    "pickle": (
        "is in PyTorch's format from before 1.6, or a bare pickle, which can run code when it is read",
        SAVE_AGAIN,
    ),
    "old": ("is a GGML file from before GGUF", "Download the model as GGUF"),
    "answer": ("is a web server's answer, not a model", "Download it again, and check the address and the proxy"),
    "empty": ("is empty", DOWNLOAD_AGAIN),
    "other": (
        "is neither safetensors nor GGUF nor PyTorch's",
        "Give a model directory, or a .gguf, .safetensors or .bin file",
    ),
}


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turn what the system says about a file into a ModelError."""
    try:
        yield
    except OSError as e:
        raise ModelError(f"cannot read {path}: {e.strerror or e}", remedy="Check the path and its permissions") from e


def sniff(path: Path) -> Kind:
    """What a file is, from its first bytes."""
    with reading(path), _open_regular(path) as fd:
        head = os.pread(fd, 32, 0)
    if not head:
        return "empty"
    if kind := _match(head, _MAGICS):
        return kind
    if head[8:9] == b"{":
        return "safetensors"
    return _match(head, _WEAK_MAGICS) or "other"


def _match(head: bytes, magics: tuple[tuple[bytes, Kind], ...]) -> Kind | None:
    return next((kind for magic, kind in magics if head.startswith(magic)), None)


def wrong_kind(path: Path, kind: Kind) -> ModelError:
    """Why a file of this kind is not a model that can be opened here."""
    what, remedy = _WRONG.get(kind, (f"is a {kind} file, which is not expected here", "Give its path alone"))
    return ModelError(f"{path} {what}", remedy=remedy)


@contextmanager
def _open_regular(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # non-blocking: a pipe must not hang us
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(None, "it is not a regular file")
        yield fd
    finally:
        os.close(fd)


def read_small(path: Path, limit_bytes: int) -> bytes:
    """The content of a file that has no reason to be large."""
    with reading(path), _open_regular(path) as fd:
        size = os.fstat(fd).st_size
        if size > limit_bytes:
            raise ModelError(f"{path} has {size} bytes, more than the {limit_bytes} it may have", remedy=DOWNLOAD_AGAIN)
        return os.pread(fd, size, 0)


@dataclass(frozen=True, slots=True)
class MappedFile:
    """A file mapped read-only: `raw` for slices of bytes, `data` for views. It is unmapped with its last view."""

    path: Path
    raw: mmap.mmap
    data: npt.NDArray[np.uint8]

    @property
    def size(self) -> int:
        return int(self.data.size)


def map_file(path: Path, kind: Kind) -> MappedFile:
    """Map a file that must be of this kind."""
    found = sniff(path)
    if found != kind:
        raise wrong_kind(path, found)
    with reading(path), _open_regular(path) as fd:
        raw = mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
    return MappedFile(path, raw, np.frombuffer(raw, dtype=np.uint8))


def drop_pages(tensors: Iterable[Tensor], *, files: bool = False) -> None:
    """Give back the memory of what the tensors are stored in; read again, it comes from the system's cache.

    `files`: that of all of their mapped files, with the headers.
    """
    whole: dict[int, mmap.mmap] = {}
    for view in _stored(tuple(tensors)):
        owner: Any = view
        while isinstance(owner, np.ndarray | memoryview):
            owner = owner.base if isinstance(owner, np.ndarray) else owner.obj
        if not isinstance(owner, mmap.mmap):
            continue
        if files:
            whole[id(owner)] = owner
        else:
            begin = view.ctypes.data - np.frombuffer(owner, np.uint8).ctypes.data
            before = begin % mmap.PAGESIZE
            owner.madvise(mmap.MADV_DONTNEED, begin - before, before + view.nbytes)
    for file in whole.values():
        file.madvise(mmap.MADV_DONTNEED)


def _stored(value: object) -> Iterator[npt.NDArray[Any]]:
    """The arrays of tensors, and of what is behind those that are made when they are read."""
    match value:
        case np.ndarray():
            yield value
        case MadeTensor():
            yield from _stored(value.origin)
        case tuple():
            for each in value:
                yield from _stored(each)
        case _ if is_dataclass(value):
            yield from _stored(tuple(getattr(value, field.name) for field in fields(value)))


@dataclass(slots=True)
class Checkpoint:
    """An open checkpoint (a TensorSource). Tensors taken from it stay valid after `close`."""

    path: str
    metadata: Mapping[str, Any]
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def close(self) -> None:
        self.tensors = {}
