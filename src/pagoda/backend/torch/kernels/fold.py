"""Attention over a tile of keys in Triton: what the kernels for prompts and for single tokens have in common."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from pagoda.backend.torch.batch import Heads
from pagoda.backend.torch.kernels import fp8
from pagoda.types import BLOCK_SIZE

NO_WINDOW = 1 << 30
LOG2_E = 1.4426950408889634
_CELLS = tl.constexpr(BLOCK_SIZE)
_TWO_LOG2_E = tl.constexpr(2 * LOG2_E)
"""Of scores and sinks, so that their powers are of two. A sink takes part in the softmax, and has no value."""


def cap_of(shape: Heads) -> float:
    """In units of log2(e); 0 for none."""
    return (shape.soft_cap or 0.0) * LOG2_E


@triton.jit
def fold(
    q: tl.tensor,
    most: tl.tensor,
    total: tl.tensor,
    acc: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    table: tl.tensor,
    key: tl.tensor,
    limit: tl.tensor,
    begins: tl.tensor,
    ends: tl.tensor,
    row_stride: tl.tensor,
    scale: tl.tensor,
    CAP: tl.constexpr,
    MASK: tl.constexpr,
    HEAD: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
) -> Any:
    """Take the keys key .. key + TILE into the running maximum, sum and weighted values of each row."""
    at, d = key + tl.arange(0, TILE), tl.arange(0, D)[None, :]
    known = at < limit
    block = tl.load(table + at // _CELLS, mask=known, other=0).to(tl.int64)
    cell = ((block * _CELLS + at % _CELLS) * row_stride)[:, None] + d
    there = known[:, None] & (d < HEAD)
    k = fp8.floats(tl.load(k_cache + cell, mask=there, other=0.0), q.dtype)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if CAP != 0.0:
        # CAP * tanh(s / CAP) by tanh(u) = 1 - 2 / (e^2u + 1); both are in units of log2(e)
        scores = CAP - 2.0 * CAP / (tl.exp2(scores * scale * (_TWO_LOG2_E / CAP)) + 1.0)
        scale = 1.0
    if MASK:
        seen = (at[None, :] < ends[:, None]) & (at[None, :] >= begins[:, None])
        scores = tl.where(seen, scores, float("-inf"))
    # the largest is found before they are scaled: what scales them then also takes it off
    new = tl.maximum(most, tl.max(scores, axis=1) * scale)
    base = tl.where(new == float("-inf"), 0.0, new)
    weights, keep = tl.exp2(scores * scale - base[:, None]), tl.exp2(most - base)
    v = fp8.floats(tl.load(v_cache + cell, mask=there, other=0.0), q.dtype)
    if v_cache.dtype.element_ty.primitive_bitwidth == 8:
        # changes no value; it keeps the compiler from moving bytes as the matrix units want them, one at a time
        v = tl.where(known[:, None], v, 0.0)
    acc = tl.dot(weights.to(q.dtype), v, acc * keep[:, None], input_precision="ieee")
    return new, total * keep + tl.sum(weights, axis=1), acc
