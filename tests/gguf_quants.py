"""Plain quantizers for test files: float32 to any block type that `pagoda.weights.ggml` can read back.

They take the obvious scale of each group and search for nothing better. The types up to Q8_0 come from the `gguf`
package; the others are written here, as inverses of the layouts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.float32)


def encode(values: Array, type: str) -> npt.NDArray[np.uint8]:
    """The bytes of a float array stored as `type`, flat; the last axis must be whole blocks."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    if type in ENCODERS:
        data = ENCODERS[type](values.reshape(-1, 32 if type in SMALL else 256))
    else:
        data = gguf.quants.quantize(np.atleast_1d(values), gguf.GGMLQuantizationType[type])
    return np.ascontiguousarray(data).view(np.uint8).reshape(-1)


def _div(a: Array, b: Array) -> Array:
    return np.divide(a, b, out=np.zeros(np.broadcast_shapes(a.shape, b.shape), np.float32), where=b != 0)


def _round(x: Array, low: int, high: int) -> Array:
    return np.clip(np.rint(x), low, high).astype(np.int16)


def _halves(q: Array) -> Array:
    return np.asarray(q[..., 0, :] | q[..., 1, :] << 4)


def _quarters(q: Array) -> Array:
    return np.asarray(q[..., 0, :] | q[..., 1, :] << 2 | q[..., 2, :] << 4 | q[..., 3, :] << 6)


def _bits(q: Array) -> Array:
    return np.packbits(q.astype(bool), axis=-2, bitorder="little").squeeze(-2)


def _bytes(*parts: Array) -> Array:
    """Parts of a block side by side: float arrays as float16, others as bytes."""
    flat = [p.reshape(len(p), -1) for p in parts]
    raw = [p.astype(np.float16).view(np.uint8) if p.dtype.kind == "f" else p.astype(np.uint8) for p in flat]
    return np.concatenate(raw, axis=1)


def _symmetric(x: Array, groups: int, top: int, scale_top: int) -> tuple[Array, Array, Array]:
    """d [n, 1], whole scales [n, groups] and numbers -top .. top - 1 [n, groups, 256 / groups]."""
    g = x.reshape(len(x), groups, -1)
    wanted = np.abs(g).max(axis=2) / (top - 1)
    d = (wanted.max(axis=1, keepdims=True) / scale_top).astype(np.float16).astype(np.float32)
    scale = _round(_div(wanted, d), 0, scale_top)
    return d, scale, _round(_div(g, (d * scale)[..., None]), -top, top - 1)


def _with_minimum(x: Array, groups: int, top: int, scale_top: int) -> tuple[Array, ...]:
    """d, dmin [n, 1], scales, minima [n, groups] and numbers 0 .. top [n, groups, 256 / groups]."""
    g = x.reshape(len(x), groups, -1)
    low = np.maximum(-g.min(axis=2), 0)
    wanted = (g.max(axis=2) + low) / top
    d, m = ((v.max(axis=1, keepdims=True) / scale_top).astype(np.float16).astype(np.float32) for v in (wanted, low))
    scale, least = _round(_div(wanted, d), 0, scale_top), _round(_div(low, m), 0, scale_top)
    q = _round(_div(g + (m * least)[..., None], (d * scale)[..., None]), 0, top)
    return d, m, scale, least, q


def _q2_k(x: Array) -> Array:
    d, m, scale, least, q = _with_minimum(x, 16, 3, 15)
    return _bytes(scale | least << 4, _quarters(q.reshape(-1, 2, 4, 32)), d, m)


def _q3_k(x: Array) -> Array:
    d, scale, q = _symmetric(x, 16, 4, 31)
    s, q = scale + 32, q + 4
    small = np.concatenate((_halves((s & 15).reshape(-1, 2, 8)), _quarters((s >> 4).reshape(-1, 4, 4))), axis=1)
    return _bytes(_bits((q >> 2).reshape(-1, 8, 32)), _quarters((q & 3).reshape(-1, 2, 4, 32)), small, d)


def _six_bits(a: Array, b: Array) -> Array:
    first, second = a[:, :4] | a[:, 4:] >> 4 << 6, b[:, :4] | b[:, 4:] >> 4 << 6
    return np.concatenate((first, second, a[:, 4:] & 15 | (b[:, 4:] & 15) << 4), axis=1)


def _q4_k(x: Array) -> Array:
    d, m, scale, least, q = _with_minimum(x, 8, 15, 63)
    return _bytes(d, m, _six_bits(scale, least), _halves(q.reshape(-1, 4, 2, 32)))


def _q5_k(x: Array) -> Array:
    d, m, scale, least, q = _with_minimum(x, 8, 31, 63)
    return _bytes(d, m, _six_bits(scale, least), _bits(q >> 4), _halves((q & 15).reshape(-1, 4, 2, 32)))


def _q6_k(x: Array) -> Array:
    d, scale, q = _symmetric(x, 16, 32, 127)
    q = q + 32
    return _bytes(_halves((q & 15).reshape(-1, 2, 2, 64)), _quarters((q >> 4).reshape(-1, 2, 4, 32)), scale, d)


def _nearest_iq4(x: Array) -> Array:
    return np.asarray(np.abs(x[..., None] - IQ4).argmin(axis=-1))


def _iq4_nl(x: Array) -> Array:
    d = (np.abs(x).max(axis=1, keepdims=True) / 113).astype(np.float16).astype(np.float32)
    return _bytes(d, _halves(_nearest_iq4(_div(x, d)).reshape(-1, 2, 16)))


def _iq4_xs(x: Array) -> Array:
    g = x.reshape(-1, 8, 32)
    wanted = np.abs(g).max(axis=2) / 113
    d = (wanted.max(axis=1, keepdims=True) / 31).astype(np.float16).astype(np.float32)
    scale = _round(_div(wanted, d), 0, 31)
    q = _nearest_iq4(_div(g, (d * scale)[..., None])).reshape(-1, 8, 2, 16)
    s = scale + 32
    low, high = _halves((s & 15).reshape(-1, 4, 2, 1)), _quarters((s >> 4).reshape(-1, 2, 4, 1))
    return _bytes(d, high, low, _halves(q))


def _grouped(x: Array, top: int) -> tuple[Array, Array, Array]:
    """d, zero point and codes 0 .. top: value = d * (code - zero)."""
    low, high = np.minimum(x.min(axis=1, keepdims=True), 0), np.maximum(x.max(axis=1, keepdims=True), 0)
    d = ((high - low) / top).astype(np.float16).astype(np.float32)
    zero = _round(_div(-low, d), 0, top)
    return d, zero, _round(_div(x, d) + zero, 0, top)


def _u4g(x: Array) -> Array:
    d, zero, q = _grouped(x, 15)
    return _bytes(d, zero, _halves(q.reshape(-1, 2, 16)))


SMALL = ("IQ4_NL", "U4G", "U8G")
ENCODERS: dict[str, Callable[[Array], Array]] = {
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "U4G": _u4g,
    "U8G": lambda x: _bytes(*_grouped(x, 255)),
}
