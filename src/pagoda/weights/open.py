"""The one way into a checkpoint: finds out by content what a path holds, and opens it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import MappingProxyType

from pagoda.errors import ModelError
from pagoda.weights.awq import awq_tensors
from pagoda.weights.files import Checkpoint, reading, sniff, wrong_kind
from pagoda.weights.fp8 import fp8_tensors
from pagoda.weights.gguf import SPLIT_NAME, open_gguf
from pagoda.weights.gptq import gptq_tensors
from pagoda.weights.mmproj import MARK, with_mmproj
from pagoda.weights.mxfp4 import mxfp4_tensors
from pagoda.weights.pytorch import PT_INDEX, TRAINING, open_pytorch
from pagoda.weights.quantization import method_of
from pagoda.weights.safetensors import INDEX, open_safetensors
from pagoda.weights.source import TensorSource

_UNPACK = MappingProxyType(
    {
        "awq": awq_tensors,
        "gptq": gptq_tensors,
        "fp8": fp8_tensors,
        "compressed-tensors": fp8_tensors,
        "mxfp4": mxfp4_tensors,
    }
)
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_SIDECARS = (MARK, "mtp-", "imatrix")  # in names of GGUF files that go with a model and are none
_WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt", ".pth")


def open_source(path: str, mmproj: str | None = None) -> TensorSource:
    """Open a GGUF, safetensors or PyTorch file, or a directory with a model in one of these formats.

    A directory that has several is opened as safetensors, else as GGUF; a file can be named by its own path.
    `mmproj` is the file of a GGUF model's image encoder, None for one that lies beside it.
    """
    source = _opened(path, mmproj)
    if mmproj is not None and not source.metadata:
        raise ModelError(f"--mmproj {mmproj}: {path} is no GGUF file, and has its encoder in it", remedy="Leave it out")
    return source


def _opened(path: str, mmproj: str | None) -> TensorSource:
    place = Path(path)
    with reading(path):
        if not path or not place.exists():
            raise _missing(path)
        if place.is_dir():
            return _open_directory(place, mmproj)
    if place.name == INDEX:
        return unpacked(open_safetensors(place))
    kind = sniff(place)
    if kind == "gguf":
        return with_mmproj(open_gguf(place), mmproj)
    if kind == "safetensors":
        return unpacked(open_safetensors(place))
    if kind == "torch" or place.name == PT_INDEX:
        return unpacked(open_pytorch(place))
    raise wrong_kind(place, kind)


def unpacked(source: Checkpoint) -> Checkpoint:
    """A quantized checkpoint with its packed matrices as tensors like all others."""
    method = method_of(source)
    if method is None:
        return source
    if method not in _UNPACK:
        raise ModelError(
            f"{source.path} is quantized with {method}, which cannot be read yet",
            remedy=f"Take a version quantized with {' or '.join(_UNPACK)}, one in floats, or a GGUF file of the model",
        )
    source.tensors = _UNPACK[method](source.path, source.config["quantization_config"], source.tensors)
    return source


def _missing(path: str) -> ModelError:
    if os.path.islink(path):
        return ModelError(f"{path} is a link to {os.readlink(path)}, which is not there", remedy="Download it again")
    if _HUB_ID.fullmatch(path):
        return ModelError(
            f"{path} is no file or directory here; it looks like the name of a model on a hub",
            remedy=f"Fetch it: pagoda pull {path}",
        )
    return ModelError(f"{path or 'the empty path'} is no file or directory", remedy="Give the path of a model")


def _open_directory(folder: Path, mmproj: str | None) -> TensorSource:
    kinds = {file.name: sniff(file) for file in sorted(folder.iterdir()) if _is_candidate(file)}
    if INDEX in kinds or any(kind == "safetensors" and name.endswith(".safetensors") for name, kind in kinds.items()):
        return unpacked(open_safetensors(folder))
    ggufs = [name for name, kind in kinds.items() if kind == "gguf"]
    if ggufs:
        return with_mmproj(open_gguf(folder / _choose(folder, ggufs)), mmproj)
    if PT_INDEX in kinds or any(kind == "torch" and name.endswith(".bin") for name, kind in kinds.items()):
        return unpacked(open_pytorch(folder))
    for name, kind in kinds.items():
        if name.endswith(_WEIGHTS):
            raise wrong_kind(folder / name, kind)
    raise ModelError(
        f"{folder} holds no model: no safetensors, GGUF or PyTorch file",
        remedy="Give the directory that has config.json and *.safetensors, or the path of a .gguf file",
    )


def _is_candidate(file: Path) -> bool:
    if file.name.endswith(_WEIGHTS) and not file.exists():
        raise _missing(str(file))
    return file.is_file() and not file.name.startswith(".") and file.name not in TRAINING


def _choose(folder: Path, names: list[str]) -> str:
    """The one GGUF model among these names; the parts of a split one count as one."""
    models = [name for name in names if not any(mark in name.lower() for mark in _SIDECARS)] or names
    first_parts: dict[str, str] = {}
    for name in models:
        match = SPLIT_NAME.fullmatch(name)
        first_parts.setdefault(match[1] if match else name, name)
    if len(first_parts) == 1:
        return models[0]
    paths = [str(folder / name) for name in first_parts.values()]
    raise ModelError(
        f"{folder} holds {len(paths)} GGUF models: {', '.join(first_parts.values())}",
        remedy=f"Give the path of one, such as {paths[0]}",
    )
