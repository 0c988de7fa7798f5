"""PyTorch checkpoints (pytorch_model.bin): state dicts in torch's zip format, mapped, read without running any code."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import numpy as np

from pagoda.errors import ModelError
from pagoda.weights.files import DOWNLOAD_AGAIN, Checkpoint, MappedFile, map_file
from pagoda.weights.ggml import BLOCKS, nbytes
from pagoda.weights.grouped import Bytes, MadeTensor
from pagoda.weights.shards import Format, open_shards
from pagoda.weights.source import Tensor
from pagoda.weights.state_dict import MAX_BYTES, NotStateDict, View, read_state_dict
from pagoda.weights.zipped import NotZip, stored_files

PT_SINGLE = "pytorch_model.bin"
PT_INDEX = "pytorch_model.bin.index.json"
TRAINING = frozenset({"optimizer.bin", "optimizer.pt", "scheduler.bin", "scheduler.pt", "training_args.bin",
                      "scaler.pt", "rng_state.pth"})  # fmt: skip
_MAX_ELEMENTS = 1 << 60


def open_pytorch(path: Path) -> Checkpoint:
    """Open a directory, one .bin, .pt or .pth file, or an index; config.json is read beside it."""
    return open_shards(path, Format("PyTorch", PT_SINGLE, PT_INDEX, ".bin", read_pytorch, TRAINING))


def read_pytorch(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, views of the mapped file; no data is read."""
    file = map_file(path, "torch")
    try:
        places = stored_files(file)
        pickles = [name for name in places if name.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise NotZip("it has no data.pkl: it is a zip file, and not one of PyTorch")
        folder = pickles[0].removesuffix("data.pkl")
        begin, end = places[pickles[0]]
        if end - begin > MAX_BYTES:
            raise NotStateDict(f"its table of tensors has {end - begin} bytes; {MAX_BYTES} are possible")
        views = read_state_dict(file.raw[begin:end])
        begin, end = places.get(f"{folder}byteorder", (0, 0))
        if file.raw[begin:end] not in (b"", b"little"):
            raise NotStateDict("its numbers are big-endian")
        return {name: _tensor(file, places, folder, name, view) for name, view in views.items()}
    except NotZip as error:
        raise ModelError(f"{path} is damaged: {error}", remedy=DOWNLOAD_AGAIN) from None
    except NotStateDict as error:
        raise ModelError(
            f"{path} is refused: {error}",
            remedy="Only plain tables of tensors are read, and no code is ever run: take the model's safetensors "
            "version, or save model.state_dict() alone",
        ) from None


def _tensor(file: MappedFile, places: dict[str, tuple[int, int]], folder: str, name: str, view: View) -> Tensor:
    storage = view.storage
    begin, end = places.get(f"{folder}data/{storage.key}", (0, -1))
    width = BLOCKS[storage.type].bytes
    if end - begin != storage.elements * width:
        raise NotStateDict(f"the storage {storage.key[:80]} of {name[:80]} is missing, or not of its size")
    most = storage.elements if all(view.shape) else _MAX_ELEMENTS
    if math.prod(size or 1 for size in view.shape) > most:
        raise NotStateDict(f"{name[:80]} is larger than its storage")
    if _contiguous(view):
        start = begin + view.offset * width if math.prod(view.shape) else begin
        return Tensor(name, view.shape, storage.type, file.data[start : start + nbytes(storage.type, view.shape)])
    return MadeTensor(name, view.shape, storage.type, partial(_gathered, file.data[begin:end], width, view))


def _contiguous(view: View) -> bool:
    step = 1
    for size, stride in zip(reversed(view.shape), reversed(view.strides), strict=True):
        if size != 1 and stride != step:
            return math.prod(view.shape) == 0
        step *= size
    return True


def _gathered(storage: Bytes, width: int, view: View) -> Bytes:
    """The elements of a view that does not lie in one run, such as a transposed matrix, in order."""
    elements = storage[view.offset * width :].view(f"V{width}")
    strides = tuple(stride * width for stride in view.strides)
    strided = np.lib.stride_tricks.as_strided(elements, view.shape, strides, writeable=False)
    return np.ascontiguousarray(strided).reshape(-1).view(np.uint8)
