"""`pagoda convert`: a PyTorch checkpoint written as safetensors, compared with what was read, and then published."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from pagoda.arch.memory import size_text
from pagoda.deploy.download.choose import TEXTS
from pagoda.deploy.download.failures import DiskFailed
from pagoda.errors import ConfigError, ModelError
from pagoda.weights.files import drop_pages
from pagoda.weights.pytorch import PT_INDEX, open_pytorch
from pagoda.weights.safetensors import INDEX, SINGLE, open_safetensors
from pagoda.weights.source import Tensor

SHARD_BYTES = 5_000_000_000
_ALIGNMENT = 8
_CHUNK_BYTES = 32 << 20
_ELSEWHERE = "Make room, or give a folder on another disk"

Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class Converted:
    """What was written."""

    tensors: int
    total_bytes: int
    files: int


def convert(source: Path, out: Path, progress: Progress, *, shard_bytes: int = SHARD_BYTES) -> Converted:
    """Write the checkpoint `source` (a folder or a file) as safetensors into the new folder `out`, with its texts.

    `out` appears when all of it is written and was read back equal; until then the files are in a folder beside it.
    """
    if out.exists():
        raise ConfigError(f"{out} is there already", remedy="Give a folder that is not there yet")
    if source.is_dir() and any(source.glob("*.safetensors")):
        raise ConfigError(f"{source} has safetensors already", remedy=f"Serve it: pagoda serve {source}")
    checkpoint = open_pytorch(source)
    shards = _shards(checkpoint.tensors, shard_bytes)
    total = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    partial = out.parent / f".{out.name}.partial"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        free = shutil.disk_usage(out.parent).free
        if free < total:
            raise ConfigError(f"{size_text(total)} are needed in {out.parent}, {size_text(free)} are free",
                              remedy=_ELSEWHERE)  # fmt: skip
        partial.mkdir()
        _copy_texts(source if source.is_dir() else source.parent, partial)
        _write(shards, partial, total, progress)
        _compare(checkpoint.tensors, partial, total, progress)
        os.rename(partial, out)
        _sync(out.parent)
    except OSError as error:
        why = error.strerror or str(error)
        raise DiskFailed(f"Cannot write to {out.parent}: {why}", remedy=_ELSEWHERE) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Converted(len(checkpoint.tensors), total, len(shards))


def _shards(tensors: Mapping[str, Tensor], shard_bytes: int) -> dict[str, list[Tensor]]:
    """The tensors of each file, in the order of the checkpoint."""
    groups: list[list[Tensor]] = [[]]
    room = shard_bytes
    for tensor in tensors.values():
        if tensor.nbytes > room and groups[-1]:
            groups.append([])
            room = shard_bytes
        groups[-1].append(tensor)
        room -= tensor.nbytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i + 1:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups)}


def _copy_texts(source: Path, target: Path) -> None:
    for file in sorted(source.iterdir()):
        if file.is_file() and file.name != PT_INDEX and any(fnmatchcase(file.name, pattern) for pattern in TEXTS):
            shutil.copyfile(file, target / file.name)
            _sync(target / file.name)


def _write(shards: Mapping[str, list[Tensor]], folder: Path, total_bytes: int, progress: Progress) -> None:
    done = 0
    for name, tensors in shards.items():
        with (folder / name).open("wb") as out:
            out.write(_header(tensors))
            for tensor in tensors:
                data = tensor.data
                for at in range(0, data.size, _CHUNK_BYTES):
                    out.write(data[at : at + _CHUNK_BYTES].data)
                drop_pages([tensor])
                done += tensor.nbytes
                progress("write", done / max(1, total_bytes))
        _sync(folder / name)
    if len(shards) > 1:
        weight_map = {tensor.name: name for name, tensors in shards.items() for tensor in tensors}
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2))
        _sync(folder / INDEX)
    _sync(folder)


def _header(tensors: list[Tensor]) -> bytes:
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for tensor in tensors:
        end = begin + tensor.nbytes
        table[tensor.name] = {"dtype": tensor.type, "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _compare(tensors: Mapping[str, Tensor], folder: Path, total_bytes: int, progress: Progress) -> None:
    """Open what was written as the engine would, and compare it byte for byte with what was read."""
    written = open_safetensors(folder).tensors
    done = 0
    for name, tensor in tensors.items():
        other = written.get(name)
        same = other is not None and (other.shape, other.type) == (tensor.shape, tensor.type)
        if other is None or not same or not np.array_equal(other.data, tensor.data):
            raise ModelError(f"{name} is not what was written to {folder}", remedy="Check the disk, and convert again")
        drop_pages([tensor, other])
        done += tensor.nbytes
        progress("compare", done / max(1, total_bytes))


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
