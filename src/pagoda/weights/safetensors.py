"""Safetensors checkpoints: one file, or shards with an index, beside their config.json."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import msgspec

from pagoda.errors import ModelError
from pagoda.weights.files import DOWNLOAD_AGAIN, Checkpoint, map_file
from pagoda.weights.ggml import BLOCKS
from pagoda.weights.shards import Format, open_shards
from pagoda.weights.source import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_MAX_HEADER_BYTES = 25_000_000
_MAX_ENTRIES = 1 << 17  # in one file; the largest whole models have about 100,000 tensors
_MAX_ELEMENTS = 1 << 60  # of a shape, zeros taken as ones: numpy counts no further
_TYPES = {name: block for name, block in BLOCKS.items() if block.elements == 1}

_Size = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]


class _Entry(msgspec.Struct):
    """A tensor in the header. The fields may be strings because `__metadata__`, free text by key, is read as one."""

    dtype: str = ""
    shape: Annotated[list[_Size], msgspec.Meta(max_length=8)] | str = ""
    data_offsets: tuple[_Size, _Size] | str = ""


def open_safetensors(path: Path) -> Checkpoint:
    """Open a directory, one .safetensors file, or an index; config.json is read beside it."""
    return open_shards(path, Format("safetensors", SINGLE, INDEX, ".safetensors", read_shard))


def read_shard(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, its header proven against its size; no data is read."""
    file = map_file(path, "safetensors")
    length = int.from_bytes(file.raw[:8], "little")
    if length > _MAX_HEADER_BYTES:
        raise _bad(path, f"its header claims {length} bytes; {_MAX_HEADER_BYTES} are possible")
    start = 8 + length
    if start > file.size:
        raise _truncated(path, "its header", start, file.size)
    header = file.raw[8:start]
    if header.count(b"{") > _MAX_ENTRIES:  # before parsing, which costs memory for each
        raise _bad(path, f"its header has more than {_MAX_ENTRIES} entries")
    try:
        entries = msgspec.json.decode(header, type=dict[str, _Entry])
    except (msgspec.MsgspecError, ValueError, RecursionError) as e:
        raise _bad(path, f"its header cannot be read ({e})") from e
    entries.pop("__metadata__", None)
    tensors: dict[str, Tensor] = {}
    end = 0
    for begin, stop, name, shape, dtype in sorted(_checked(path, name, entry) for name, entry in entries.items()):
        if begin != end:
            raise _bad(path, f"the data of the tensor {name} begins at {begin}, not at {end} where the one before ends")
        end = stop
        if start + end > file.size:
            raise _truncated(path, f"the tensor {name}", start + end, file.size)
        tensors[name] = Tensor(name, shape, dtype, file.data[start + begin : start + end])
    if start + end != file.size:
        raise _bad(path, f"{file.size - start - end} bytes follow its last tensor")
    return tensors


def _checked(path: Path, name: str, entry: _Entry) -> tuple[int, int, str, tuple[int, ...], str]:
    """An entry as (begin, end, name, shape, type), its length proven to be that of its shape."""
    if isinstance(entry.shape, str) or isinstance(entry.data_offsets, str):
        raise _bad(path, f"the tensor {name} has no shape or no offsets")
    if entry.dtype not in _TYPES:
        raise ModelError(
            f"{path}: the tensor {name} has the type {entry.dtype!r}, which is not known",
            remedy=f"Known types: {', '.join(_TYPES)}",
        )
    begin, end = entry.data_offsets
    if math.prod(size or 1 for size in entry.shape) > _MAX_ELEMENTS:
        raise _bad(path, f"the tensor {name} has the shape {entry.shape}")
    if end - begin != math.prod(entry.shape) * _TYPES[entry.dtype].bytes:
        raise _bad(path, f"the tensor {name} has {end - begin} bytes, not those of {entry.dtype} {entry.shape}")
    return begin, end, name, tuple(entry.shape), entry.dtype


def _bad(path: Path, why: str) -> ModelError:
    return ModelError(f"{path} is damaged: {why}", remedy=DOWNLOAD_AGAIN)


def _truncated(path: Path, what: str, need: int, size: int) -> ModelError:
    return ModelError(f"{path} is truncated: {what} ends at {need} of {size} bytes", remedy=DOWNLOAD_AGAIN)
