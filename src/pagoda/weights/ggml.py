"""Storage types of tensors: their sizes, the layout of their blocks, and their exact values in float32."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pagoda.errors import ModelError
from pagoda.weights.source import Tensor


class BlockType(NamedTuple):
    """A storage type: `elements` values along the last axis are kept in `bytes` bytes.

    `id` is the number of the type in a GGUF file, -1 for types that GGUF does not have.
    """

    name: str
    id: int
    elements: int
    bytes: int


Blocks = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]

BLOCKS: dict[str, BlockType] = {
    name: BlockType(name, id, elements, bytes)
    for name, id, elements, bytes in (
        ("F32", 0, 1, 4),
        ("F16", 1, 1, 2),
        ("Q4_0", 2, 32, 18),
        ("Q4_1", 3, 32, 20),
        ("Q5_0", 6, 32, 22),
        ("Q5_1", 7, 32, 24),
        ("Q8_0", 8, 32, 34),
        ("Q2_K", 10, 256, 84),
        ("Q3_K", 11, 256, 110),
        ("Q4_K", 12, 256, 144),
        ("Q5_K", 13, 256, 176),
        ("Q6_K", 14, 256, 210),
        ("IQ2_XXS", 16, 256, 66),
        ("IQ2_XS", 17, 256, 74),
        ("IQ3_XXS", 18, 256, 98),
        ("IQ1_S", 19, 256, 50),
        ("IQ4_NL", 20, 32, 18),
        ("IQ3_S", 21, 256, 110),
        ("IQ2_S", 22, 256, 82),
        ("IQ4_XS", 23, 256, 136),
        ("I8", 24, 1, 1),
        ("I16", 25, 1, 2),
        ("I32", 26, 1, 4),
        ("I64", 27, 1, 8),
        ("F64", 28, 1, 8),
        ("IQ1_M", 29, 256, 56),
        ("BF16", 30, 1, 2),
        ("TQ1_0", 34, 256, 54),
        ("TQ2_0", 35, 256, 66),
        ("MXFP4", 39, 32, 17),
        ("NVFP4", 40, 64, 36),
        ("Q1_0", 41, 128, 18),
        ("Q2_0", 42, 64, 18),
        ("BOOL", -1, 1, 1),
        ("U8", -1, 1, 1),
        ("U16", -1, 1, 2),
        ("U32", -1, 1, 4),
        ("U64", -1, 1, 8),
        ("F8_E4M3", -1, 1, 1),
        ("F8_E5M2", -1, 1, 1),
        ("F8_E8M0", -1, 1, 1),
        ("U4G", -1, 32, 19),  # of no file: what AWQ and GPTQ become, see weights/grouped.py
        ("U8G", -1, 32, 35),
    )
}

_CHUNK = 1 << 18  # elements decoded at a time: the temporaries stay in the cache, and small beside the result


def nbytes(type: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor as stored."""
    if type not in BLOCKS:
        raise ModelError(f"the tensor type {type} is not known", remedy=f"Known types: {', '.join(BLOCKS)}")
    block = BLOCKS[type]
    if (shape[-1] if shape else 1) % block.elements:
        raise ModelError(f"{type} needs a last axis that is a multiple of {block.elements}, not the shape {shape}")
    return math.prod(shape) // block.elements * block.bytes


def dequantize(tensor: Tensor) -> Float32:
    """The tensor's values: a new float32 array of its shape."""
    if tensor.type not in _CODECS:
        raise ModelError(
            f"the tensor {tensor.name} is stored as {tensor.type}, which cannot be computed with yet",
            remedy=f"Use a file whose tensors are one of: {', '.join(_CODECS)}",
        )
    if tensor.nbytes != nbytes(tensor.type, tensor.shape):
        raise ModelError(f"the tensor {tensor.name} has {tensor.nbytes} bytes, which does not fit its shape")
    layout, decode = _CODECS[tensor.type]
    blocks = tensor.data.view(layout)
    elements = BLOCKS[tensor.type].elements
    out = np.empty((blocks.size, elements), dtype=np.float32)
    step = _CHUNK // elements
    for i in range(0, blocks.size, step):
        part = blocks[i : i + step]
        out[i : i + step] = decode(part).reshape(part.size, elements)
    return out.reshape(tensor.shape)


def _float(values: Blocks, axes: int = 0) -> Float32:
    """Values as float32, with `axes` axes of length 1 added behind to spread them over their group."""
    return values.astype(np.float32).reshape(values.shape + (1,) * axes)


def _halves(packed: Blocks) -> Blocks:
    """Two 4-bit numbers per byte [..., n] -> [..., 2, n]: the low halves come before the high ones."""
    return np.stack((packed & 15, packed >> 4), axis=-2)


def _quarters(packed: Blocks) -> Blocks:
    """Four 2-bit numbers per byte [..., n] -> [..., 4, n], lowest bits first."""
    return packed[..., None, :] >> np.array([[0], [2], [4], [6]], dtype=np.uint8) & 3


def _bits(packed: Blocks) -> Blocks:
    """Eight bits per byte [..., n] -> [..., 8, n], lowest first."""
    return packed[..., None, :] >> np.arange(8, dtype=np.uint8)[:, None] & 1


def _bf16(b: Blocks) -> Float32:
    return (b.astype(np.uint32) << 16).view(np.float32)


def _q4_0(b: Blocks) -> Float32:
    return _float(b["d"], 2) * (_halves(b["q"]).astype(np.int8) - 8)


def _q4_1(b: Blocks) -> Float32:
    return _float(b["d"], 2) * _halves(b["q"]) + _float(b["m"], 2)


def _fifth_bits(b: Blocks) -> Blocks:
    high = np.unpackbits(b["h"], axis=1, bitorder="little")
    return high << 4 | _halves(b["q"]).reshape(-1, 32)


def _q5_0(b: Blocks) -> Float32:
    return _float(b["d"], 1) * (_fifth_bits(b).astype(np.int8) - 16)


def _q5_1(b: Blocks) -> Float32:
    return _float(b["d"], 1) * _fifth_bits(b) + _float(b["m"], 1)


def _q8_0(b: Blocks) -> Float32:
    return _float(b["d"], 1) * _float(b["q"])


def _q2_k(b: Blocks) -> Float32:
    scale = _float(b["d"], 1) * (b["s"] & 15)
    low = _float(b["m"], 1) * (b["s"] >> 4)
    q = _quarters(b["q"].reshape(-1, 2, 32)).reshape(-1, 16, 16)
    return scale[..., None] * q - low[..., None]


def _q3_k(b: Blocks) -> Float32:
    low = _halves(b["s"][:, :8]).reshape(-1, 16)
    high = _quarters(b["s"][:, 8:]).reshape(-1, 16)
    scale = _float(b["d"], 1) * ((low | high << 4).astype(np.int8) - 32)
    q = _quarters(b["q"].reshape(-1, 2, 32)) | _bits(b["h"]).reshape(-1, 2, 4, 32) << 2
    return _float(scale, 1) * _float((q.astype(np.int8) - 4).reshape(-1, 16, 16))


def _scales_and_mins(b: Blocks) -> tuple[Float32, Float32]:
    """Eight 6-bit scales and eight 6-bit minima out of 12 bytes, times d and m: two [n, 8, 1]."""
    x, y, z = b["s"][:, :4], b["s"][:, 4:8], b["s"][:, 8:]
    scale = np.concatenate((x & 63, z & 15 | x >> 6 << 4), axis=1)
    low = np.concatenate((y & 63, z >> 4 | y >> 6 << 4), axis=1)
    return (_float(b["d"], 1) * scale)[..., None], (_float(b["m"], 1) * low)[..., None]


def _q4_k(b: Blocks) -> Float32:
    scale, low = _scales_and_mins(b)
    return scale * _halves(b["q"].reshape(-1, 4, 32)).reshape(-1, 8, 32) - low


def _q5_k(b: Blocks) -> Float32:
    scale, low = _scales_and_mins(b)
    q = _halves(b["q"].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    return scale * (_bits(b["h"]) << 4 | q) - low


def _q6_k(b: Blocks) -> Float32:
    scale = _float(b["d"], 1) * b["s"]
    low = _halves(b["q"].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    q = (low | _quarters(b["h"].reshape(-1, 2, 32)) << 4).astype(np.int8) - 32
    return _float(scale, 1) * _float(q.reshape(-1, 16, 16))


_IQ4_VALUES = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113],
    dtype=np.float32,
)


def _iq4_nl(b: Blocks) -> Float32:
    return _float(b["d"], 2) * _IQ4_VALUES[_halves(b["q"])]


def _iq4_xs(b: Blocks) -> Float32:
    low = _halves(b["s"][..., None]).reshape(-1, 8)
    high = _quarters(b["h"][..., None]).reshape(-1, 8)
    scale = _float(b["d"], 1) * ((low | high << 4).astype(np.int8) - 32)
    return _float(scale, 2) * _IQ4_VALUES[_halves(b["q"].reshape(-1, 8, 16))]


# 4-bit floats (E2M1) times two: whole numbers, which two halves of a scale make up for
_E2M1_DOUBLED = np.array([0, 1, 2, 3, 4, 6, 8, 12, -0.0, -1, -2, -3, -4, -6, -8, -12], dtype=np.float32)


def _mxfp4(b: Blocks) -> Float32:
    """OCP Microscaling Formats 1.0: the scale of a block is the power of two whose exponent is kept, less 127."""
    scale = np.ldexp(np.float32(1), b["e"].astype(np.int32) - 128)
    return _float(scale, 2) * _E2M1_DOUBLED[_halves(b["q"])]


def _u4g(b: Blocks) -> Float32:
    return _float(b["d"], 2) * _float(_halves(b["q"]).astype(np.int16) - b["z"].astype(np.int16)[:, None, None])


def _u8g(b: Blocks) -> Float32:
    return _float(b["d"], 1) * _float(b["q"].astype(np.int16) - b["z"].astype(np.int16)[:, None])


def _layout(*fields: tuple[str, str] | tuple[str, str, int]) -> np.dtype[Any]:
    return np.dtype(list(fields))


_D, _M, _Z = ("d", "<f2"), ("m", "<f2"), ("z", "u1")
# Fields in file order: d scale, m minimum (or its scale), z zero point, s small scales, q low bits of the numbers,
# h high bits.
_CODECS: dict[str, tuple[np.dtype[Any], Callable[[Blocks], Float32]]] = {
    "F32": (np.dtype("<f4"), _float),
    "F16": (np.dtype("<f2"), _float),
    "BF16": (np.dtype("<u2"), _bf16),
    "Q4_0": (_layout(_D, ("q", "u1", 16)), _q4_0),
    "Q4_1": (_layout(_D, _M, ("q", "u1", 16)), _q4_1),
    "Q5_0": (_layout(_D, ("h", "u1", 4), ("q", "u1", 16)), _q5_0),
    "Q5_1": (_layout(_D, _M, ("h", "u1", 4), ("q", "u1", 16)), _q5_1),
    "Q8_0": (_layout(_D, ("q", "i1", 32)), _q8_0),
    "Q2_K": (_layout(("s", "u1", 16), ("q", "u1", 64), _D, _M), _q2_k),
    "Q3_K": (_layout(("h", "u1", 32), ("q", "u1", 64), ("s", "u1", 12), _D), _q3_k),
    "Q4_K": (_layout(_D, _M, ("s", "u1", 12), ("q", "u1", 128)), _q4_k),
    "Q5_K": (_layout(_D, _M, ("s", "u1", 12), ("h", "u1", 32), ("q", "u1", 128)), _q5_k),
    "Q6_K": (_layout(("q", "u1", 128), ("h", "u1", 64), ("s", "i1", 16), _D), _q6_k),
    "IQ4_NL": (_layout(_D, ("q", "u1", 16)), _iq4_nl),
    "IQ4_XS": (_layout(_D, ("h", "u1", 2), ("s", "u1", 4), ("q", "u1", 128)), _iq4_xs),
    "MXFP4": (_layout(("e", "u1"), ("q", "u1", 16)), _mxfp4),
    "U4G": (_layout(_D, _Z, ("q", "u1", 16)), _u4g),
    "U8G": (_layout(_D, _Z, ("q", "u1", 32)), _u8g),
}
