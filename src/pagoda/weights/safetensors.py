"""Safetensors checkpoints: one file, or shards with an index, beside their config.json."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import msgspec

from pagoda.errors import ModelError
from pagoda.weights.files import DOWNLOAD_AGAIN, Checkpoint, map_file, read_small
from pagoda.weights.ggml import BLOCKS
from pagoda.weights.source import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_MAX_HEADER_BYTES = 25_000_000
_MAX_ENTRIES = 1 << 17  # in one file; the largest whole models have about 100,000 tensors
_MAX_JSON_BYTES = 64_000_000
_MAX_ELEMENTS = 1 << 60  # of a shape, zeros taken as ones: numpy counts no further
_TYPES = {name: block for name, block in BLOCKS.items() if block.elements == 1}

_Size = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]


class _Entry(msgspec.Struct):
    """A tensor in the header. The fields may be strings because `__metadata__`, free text by key, is read as one."""

    dtype: str = ""
    shape: Annotated[list[_Size], msgspec.Meta(max_length=8)] | str = ""
    data_offsets: tuple[_Size, _Size] | str = ""


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def open_safetensors(path: Path) -> Checkpoint:
    """Open a directory, one .safetensors file, or an index; config.json is read beside it."""
    folder = path if path.is_dir() else path.parent
    shards = _shards(path)
    config = _config(folder)
    tensors: dict[str, Tensor] = {}
    for name, expected in sorted(shards.items()):
        shard = read_shard(folder / name)
        if twice := tensors.keys() & shard.keys():
            raise ModelError(f"{folder / name} repeats the tensor {min(twice)} of another shard", remedy=DOWNLOAD_AGAIN)
        if missing := expected - shard.keys():
            raise ModelError(
                f"{folder / name} lacks the tensor {min(missing)} that {INDEX} promises",
                remedy="Download the shard and the index again",
            )
        tensors |= shard
    return Checkpoint(str(path), {}, config, tensors)


def _shards(path: Path) -> dict[str, set[str]]:
    """The files that make the checkpoint, each with the tensors that an index says it has."""
    if not path.is_dir():
        return _index(path) if path.name == INDEX else {path.name: set()}
    if (path / SINGLE).exists():
        return {SINGLE: set()}
    if (path / INDEX).exists():
        return _index(path / INDEX)
    names = sorted(file.name for file in path.glob("*.safetensors"))
    if len(names) == 1:
        return {names[0]: set()}
    raise ModelError(
        f"{path} has {len(names)} safetensors files and no {INDEX} that says how they belong together",
        remedy=f"Download {INDEX} into it, or give the path of one file",
    )


def _index(path: Path) -> dict[str, set[str]]:
    try:
        weight_map = msgspec.json.decode(read_small(path, _MAX_JSON_BYTES), type=_Index).weight_map
    except (msgspec.MsgspecError, ValueError, RecursionError) as e:
        raise ModelError(f"{path} is not a safetensors index: {e}", remedy=DOWNLOAD_AGAIN) from e
    shards: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        shards.setdefault(name, set()).add(tensor)
    for name in shards:
        if not name.endswith(".safetensors") or Path(name).name != name or "\0" in name:
            raise ModelError(f"{path} names {name!r}, which is no safetensors file beside it", remedy=DOWNLOAD_AGAIN)
    missing = sorted(name for name in shards if not (path.parent / name).exists())
    if missing or not shards:
        raise ModelError(
            f"{len(missing)} of the {len(shards)} shards that {path} names are missing: {', '.join(missing[:5])}",
            remedy="Download them into the same folder",
        )
    return shards


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.exists():
        raise ModelError(f"{path} is missing, and safetensors need it", remedy="Download the model's config.json")
    try:
        config = json.loads(read_small(path, _MAX_JSON_BYTES))
    except (ValueError, RecursionError) as e:
        raise ModelError(f"{path} is not JSON: {e}", remedy=DOWNLOAD_AGAIN) from e
    if not isinstance(config, dict):
        raise ModelError(f"{path} is not a JSON object", remedy=DOWNLOAD_AGAIN)
    return config


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
