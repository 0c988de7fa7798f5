"""The matrix product of the reference, whose rows do not depend on how many come with them."""

from __future__ import annotations

import numpy as np

from pagoda.types import Float32

TILE = 16
"""Rows per matrix product. Always the same, so that a row's result does not depend on how many come with it."""


def matmul(x: Float32, weight: Float32) -> Float32:
    """x [T, in] times the transpose of weight [out, in], in tiles of TILE rows."""
    rows = len(x)
    padded = np.zeros((-(-rows // TILE) * TILE, x.shape[1]), np.float32)
    padded[:rows] = x
    out = np.empty((len(padded), len(weight)), np.float32)
    for start in range(0, len(padded), TILE):
        np.matmul(padded[start : start + TILE], weight.T, out=out[start : start + TILE])
    return out[:rows]


def rms(x: Float32, eps: float) -> Float32:
    """RMS norm over the last axis, without weights."""
    return np.asarray(x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + np.float32(eps)))
