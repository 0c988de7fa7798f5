"""Writes GGUF files for tests: metadata from Python values, tensors from float arrays in any type we read."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf_quants import encode

from pagoda.weights.ggml import BLOCKS
from pagoda.weights.source import Tensor

Stored = npt.NDArray[Any] | tuple[npt.NDArray[Any], str] | Tensor

_NUMPY_TYPES = {"u1": 0, "i1": 1, "u2": 2, "i2": 3, "u4": 4, "i4": 5, "f4": 6, "b1": 7, "u8": 10, "i8": 11, "f8": 12}


def make_tensor(name: str, values: npt.NDArray[Any], type: str = "F32") -> Tensor:
    """A float array as a stored tensor."""
    return Tensor(name, values.shape, type, encode(values, type))


def write_gguf(
    path: str | Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Stored],
    *,
    version: int = 3,
) -> None:
    """Write a file. A tensor is a float array (F32), an (array, type) pair, or a Tensor already stored.

    Python ints become uint32 (int32 where negative, 64 bits where they need them), floats float32; numpy scalars and
    arrays keep their type. `general.alignment` in the metadata is honoured.
    """
    stored = {name: _stored(name, value) for name, value in tensors.items()}
    alignment = int(metadata.get("general.alignment", 32))
    head = b"GGUF" + struct.pack("<IQQ", version, len(stored), len(metadata))
    head += b"".join(_string(key) + _typed(value) for key, value in metadata.items())
    data = b""
    for name, tensor in stored.items():
        dims = tensor.shape[::-1]
        head += _string(name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        head += struct.pack("<IQ", BLOCKS[tensor.type].id, len(data))
        data += tensor.data.tobytes() + bytes(-tensor.nbytes % alignment)
    Path(path).write_bytes(head + bytes(-len(head) % alignment) + data)


def _stored(name: str, value: Stored) -> Tensor:
    if isinstance(value, Tensor):
        return value
    return make_tensor(name, *value) if isinstance(value, tuple) else make_tensor(name, value)


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _typed(value: Any) -> bytes:
    type_id, payload = _value(value)
    return struct.pack("<I", type_id) + payload


def _value(value: Any) -> tuple[int, bytes]:
    if isinstance(value, str):
        return 8, _string(value)
    if isinstance(value, np.ndarray | np.generic):
        type_id = _NUMPY_TYPES[value.dtype.str[1:]]
        payload = value.tobytes()
        return (9, struct.pack("<IQ", type_id, value.size) + payload) if value.ndim else (type_id, payload)
    if isinstance(value, list | tuple):
        items = [_value(item) for item in _alike(value)]
        type_id = items[0][0] if items else 4
        return 9, struct.pack("<IQ", type_id, len(items)) + b"".join(payload for _, payload in items)
    return _value(_as_numpy(value))


def _as_numpy(value: bool | int | float) -> np.generic:
    if isinstance(value, bool):
        return np.bool_(value)
    if isinstance(value, float):
        return np.float32(value)
    if value < 0:
        return np.int32(value) if value >= -(2**31) else np.int64(value)
    return np.uint32(value) if value < 2**32 else np.uint64(value)


def _alike(values: list[Any] | tuple[Any, ...]) -> list[Any]:
    """Elements of an array have one type: whole numbers become int32, mixed numbers float32."""
    if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        return list(values)
    if any(isinstance(v, float) for v in values):
        return [np.float32(v) for v in values]
    return [np.int32(v) for v in values]
