"""GGUF files, versions 2 and 3, single or split: metadata and tensors, every size checked against the file."""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from pathlib import Path
from struct import Struct
from typing import Any

import numpy as np

from pagoda.errors import ModelError
from pagoda.weights.files import DOWNLOAD_AGAIN, Checkpoint, MappedFile, map_file
from pagoda.weights.ggml import BLOCKS, nbytes
from pagoda.weights.source import Tensor
from pagoda.weights.texts import Texts

SPLIT_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")

_U32, _U64 = Struct("<I"), Struct("<Q")
_STRING, _ARRAY = 8, 9
_NUMBERS: dict[int, np.dtype[Any]] = {
    0: np.dtype("u1"),
    1: np.dtype("i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_TYPES = {block.id: block for block in BLOCKS.values() if block.id >= 0}
_MIN_PAIR_BYTES = 13  # key length, value type, one byte
_MIN_INFO_BYTES = 32  # name length, number of dimensions, one dimension, type, offset
_MAX_NAME_BYTES = 65535
_MAX_HEADER_BYTES = 1 << 27  # a large vocabulary with its merges has about 20 MB
_MAX_ELEMENTS = 1 << 23  # of all metadata arrays together; a large vocabulary has below a million
_MAX_DEPTH = 4
_FEW = 1000  # texts of an array that are read at once


def open_gguf(path: Path) -> Checkpoint:
    """Open a GGUF file; any part of a split one opens them all."""
    metadata, tensors = _read(path)
    count = metadata.get("split.count", 1)
    if not isinstance(count, int) or count <= 1:
        return Checkpoint(str(path), metadata, {}, tensors)
    match = SPLIT_NAME.fullmatch(path.name)
    if not match or int(match[3]) != count:
        raise ModelError(
            f"{path} is one part of {count}, but its name does not say so",
            remedy=f"Name the parts NAME-00001-of-{count:05}.gguf and so on",
        )
    return _join([path.with_name(f"{match[1]}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)])


def _join(parts: list[Path]) -> Checkpoint:
    missing = [part.name for part in parts if not part.exists()]
    if missing:
        raise ModelError(
            f"{len(missing)} of the {len(parts)} parts of {parts[0]} are missing, such as {missing[0]}",
            remedy="Download them into the same folder",
        )
    first, tensors = _read(parts[0])
    expected = first.get("split.tensors.count")
    for number, part in enumerate(parts):
        metadata, more = (first, {}) if number == 0 else _read(part)
        if metadata.get("split.no") != number or metadata.get("split.count") != len(parts):
            raise ModelError(f"{part} is not the part its name says", remedy=DOWNLOAD_AGAIN)
        if twice := tensors.keys() & more.keys():
            raise ModelError(f"{part} repeats the tensor {min(twice)} of another part", remedy=DOWNLOAD_AGAIN)
        tensors |= more
    if expected is not None and expected != len(tensors):
        raise ModelError(f"the parts of {parts[0]} hold {len(tensors)} tensors, not {expected}", remedy=DOWNLOAD_AGAIN)
    return Checkpoint(str(parts[0]), first, {}, tensors)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return _Reader(map_file(path, "gguf")).read()


class _Reader:
    """Walks the header of one file. `_need` proves every count and length before anything is allocated for it."""

    def __init__(self, file: MappedFile) -> None:
        self._file = file
        self._raw = file.raw
        self._size = file.size
        self._limit = min(file.size, _MAX_HEADER_BYTES)
        self._pos = len(b"GGUF")
        self._elements = 0

    def read(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        self._check_version(self._u32("the version"))
        tensor_count, pair_count = self._u64("the number of tensors"), self._u64("the number of metadata keys")
        self._need(tensor_count * _MIN_INFO_BYTES + pair_count * _MIN_PAIR_BYTES, "the header")
        metadata: dict[str, Any] = {}
        for _ in range(pair_count):
            key = self._name("a metadata key")
            if key in metadata:
                raise self._bad(f"the metadata key {key} is there twice")
            metadata[key] = self._value(self._u32(key), key)
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
            raise self._bad(f"general.alignment is {alignment!r}, not a power of two")
        infos = [self._info() for _ in range(tensor_count)]
        start = -(-self._pos // alignment) * alignment
        tensors: dict[str, Tensor] = {}
        for name, shape, type_id, offset in infos:
            if name in tensors:
                raise self._bad(f"the tensor {name} is there twice")
            tensors[name] = self._tensor(name, shape, type_id, offset, start, alignment)
        return metadata, tensors

    def _check_version(self, version: int) -> None:
        if version in (2, 3):
            return
        if version & 0xFFFF == 0:
            raise ModelError(f"{self._file.path} is a big-endian GGUF file", remedy="Take the little-endian one")
        raise ModelError(
            f"{self._file.path} is GGUF version {version}; versions 2 and 3 can be read",
            remedy="Take a newer file of the model" if version < 2 else "Update pagoda, or take a file of version 3",
        )

    def _bad(self, why: str) -> ModelError:
        return ModelError(f"{self._file.path} is damaged: {why}", remedy=DOWNLOAD_AGAIN)

    def _need(self, count: int, what: str) -> None:
        if count > self._size - self._pos:
            raise ModelError(
                f"{self._file.path} is truncated or damaged: {what} goes past its end at {self._size} bytes",
                remedy=DOWNLOAD_AGAIN,
            )
        if count > self._limit - self._pos:
            raise self._bad(f"{what} goes past the {_MAX_HEADER_BYTES} bytes that a header may have")

    def _u32(self, what: str) -> int:
        self._need(4, what)
        self._pos += 4
        return int(_U32.unpack_from(self._raw, self._pos - 4)[0])

    def _u64(self, what: str) -> int:
        self._need(8, what)
        self._pos += 8
        return int(_U64.unpack_from(self._raw, self._pos - 8)[0])

    def _name(self, what: str) -> str:
        length = self._u64(what)
        self._need(length, what)
        if length > _MAX_NAME_BYTES:
            raise self._bad(f"{what} has {length} bytes")
        self._pos += length
        try:
            return str(self._raw[self._pos - length : self._pos], "utf-8")
        except UnicodeDecodeError:
            raise self._bad(f"{what} is not UTF-8") from None

    def _value(self, type_id: int, key: str, depth: int = 0) -> Any:
        if type_id == _STRING:
            return self._strings(1, key)[0]
        if type_id == _ARRAY:
            return self._array(key, depth)
        if type_id not in _NUMBERS:
            raise self._bad(f"the metadata key {key} has the unknown type {type_id}")
        return self._numbers(_NUMBERS[type_id], 1, key)[0]

    def _array(self, key: str, depth: int) -> Sequence[Any]:
        if depth == _MAX_DEPTH:
            raise self._bad(f"the metadata key {key} nests arrays deeper than {_MAX_DEPTH}")
        type_id, count = self._u32(key), self._u64(key)
        self._need(count * (_NUMBERS[type_id].itemsize if type_id in _NUMBERS else 8), key)
        self._elements += count
        if self._elements > _MAX_ELEMENTS:
            raise self._bad(f"the metadata key {key} is an array of {count} elements")
        if type_id in _NUMBERS:
            return self._numbers(_NUMBERS[type_id], count, key)
        if type_id == _STRING:
            texts = self._strings(count, key)
            return texts if count > _FEW else list(texts)
        return [self._value(type_id, key, depth + 1) for _ in range(count)]

    def _numbers(self, dtype: np.dtype[Any], count: int, key: str) -> list[Any]:
        self._need(dtype.itemsize * count, key)
        values = np.frombuffer(self._raw, dtype=dtype, count=count, offset=self._pos)
        self._pos += values.nbytes
        return list(values.tolist())

    def _strings(self, count: int, key: str) -> Texts:
        # A vocabulary comes through here: everything in locals, and few operations per string.
        raw, limit, end, length_at = self._raw, self._limit, self._pos, _U64.unpack_from
        ends = array("q", [end])
        for _ in range(count):
            begin = end + 8
            end = begin + length_at(raw, end)[0] if begin <= limit else begin
            if end > limit:
                self._need(end - self._pos, key)
            ends.append(end)
        self._pos = end
        bounds = np.array(ends, np.int64)
        return Texts(raw, bounds[:-1] + 8, np.diff(bounds) - 8)

    def _info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._name("a tensor's name")
        rank = self._u32(name)
        if not 1 <= rank <= 4:
            raise self._bad(f"the tensor {name} has {rank} dimensions; 1 to 4 are possible")
        dims = tuple(self._u64(name) for _ in range(rank))
        return name, dims[::-1], self._u32(name), self._u64(name)

    def _tensor(
        self, name: str, shape: tuple[int, ...], type_id: int, offset: int, start: int, alignment: int
    ) -> Tensor:
        block = _TYPES.get(type_id)
        if block is None:
            raise ModelError(
                f"{self._file.path}: the tensor {name} has the type {type_id}, which is not known",
                remedy="Take a file quantized to a known type, such as Q4_K_M or Q8_0",
            )
        if not all(shape) or shape[-1] % block.elements:
            raise self._bad(f"the tensor {name} is {block.name} but has the shape {shape}")
        if offset % alignment:
            raise self._bad(f"the tensor {name} does not begin at a multiple of {alignment} bytes")
        begin = start + offset
        end = begin + nbytes(block.name, shape)
        if end > self._size:
            raise ModelError(
                f"{self._file.path} is truncated: the tensor {name} ends at {end} of {self._size} bytes",
                remedy=DOWNLOAD_AGAIN,
            )
        return Tensor(name, shape, block.name, self._file.data[begin:end])
