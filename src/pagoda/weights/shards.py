"""A checkpoint of one file, or of shards that an index names, beside its config.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from pagoda.errors import ModelError
from pagoda.weights.files import DOWNLOAD_AGAIN, Checkpoint, read_small
from pagoda.weights.source import Tensor

_MAX_JSON_BYTES = 64_000_000


@dataclass(frozen=True, slots=True)
class Format:
    """How the files of a format are called. `read` gives the tensors of one, `others` are files that hold no model."""

    name: str
    single: str
    index: str
    suffix: str
    read: Callable[[Path], dict[str, Tensor]]
    others: frozenset[str] = frozenset()


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def open_shards(path: Path, format: Format) -> Checkpoint:
    """Open a directory, one file, or an index; config.json is read beside it."""
    folder = path if path.is_dir() else path.parent
    shards = _shards(path, format)
    config = read_config(folder)
    tensors: dict[str, Tensor] = {}
    for name, expected in sorted(shards.items()):
        shard = format.read(folder / name)
        if twice := tensors.keys() & shard.keys():
            raise ModelError(f"{folder / name} repeats the tensor {min(twice)} of another shard", remedy=DOWNLOAD_AGAIN)
        if missing := expected - shard.keys():
            raise ModelError(
                f"{folder / name} lacks the tensor {min(missing)} that {format.index} promises",
                remedy="Download the shard and the index again",
            )
        tensors |= shard
    return Checkpoint(str(path), {}, config, tensors)


def _shards(path: Path, format: Format) -> dict[str, set[str]]:
    """The files that make the checkpoint, each with the tensors that an index says it has."""
    if not path.is_dir():
        return _index(path, format) if path.name == format.index else {path.name: set()}
    if (path / format.single).exists():
        return {format.single: set()}
    if (path / format.index).exists():
        return _index(path / format.index, format)
    names = sorted(file.name for file in path.glob(f"*{format.suffix}") if file.name not in format.others)
    if len(names) == 1:
        return {names[0]: set()}
    raise ModelError(
        f"{path} has {len(names)} {format.name} files and no {format.index} that says how they belong together",
        remedy=f"Download {format.index} into it, or give the path of one file",
    )


def _index(path: Path, format: Format) -> dict[str, set[str]]:
    try:
        weight_map = msgspec.json.decode(read_small(path, _MAX_JSON_BYTES), type=_Index).weight_map
    except (msgspec.MsgspecError, ValueError, RecursionError) as e:
        raise ModelError(f"{path} is not a {format.name} index: {e}", remedy=DOWNLOAD_AGAIN) from e
    shards: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        shards.setdefault(name, set()).add(tensor)
    for name in shards:
        if not name.endswith(format.suffix) or Path(name).name != name or "\0" in name:
            raise ModelError(f"{path} names {name!r}, which is no {format.name} file beside it", remedy=DOWNLOAD_AGAIN)
    missing = sorted(name for name in shards if not (path.parent / name).exists())
    if missing or not shards:
        raise ModelError(
            f"{len(missing)} of the {len(shards)} shards that {path} names are missing: {', '.join(missing[:5])}",
            remedy="Download them into the same folder",
        )
    return shards


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a folder."""
    path = folder / "config.json"
    if not path.exists():
        raise ModelError(f"{path} is missing, and the weights need it", remedy="Download the model's config.json")
    try:
        config = json.loads(read_small(path, _MAX_JSON_BYTES))
    except (ValueError, RecursionError) as e:
        raise ModelError(f"{path} is not JSON: {e}", remedy=DOWNLOAD_AGAIN) from e
    if not isinstance(config, dict):
        raise ModelError(f"{path} is not a JSON object", remedy=DOWNLOAD_AGAIN)
    return config
