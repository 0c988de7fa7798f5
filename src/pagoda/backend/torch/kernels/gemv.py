"""The product of one row and a matrix in Triton: bound by the reading of the weight, so no matrix unit is asked."""

from __future__ import annotations

import triton
import triton.language as tl

from pagoda.backend.torch.kernels.product import DENSE, F8, W8


@triton.jit
def _float_of(values: tl.tensor) -> tl.tensor:
    """Whole numbers 0 to 255 in int32 as floats: or'ed into the bits of 2^23, and that taken off again."""
    return (values | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def _gemv(
    x: tl.tensor,
    weight: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    out: tl.tensor,
    N: tl.tensor,
    pitch: tl.tensor,
    scale_columns: tl.tensor,
    KIND: tl.constexpr,
    ZERO: tl.constexpr,
    BY_ROW: tl.constexpr,
    GROUP: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
) -> None:
    """out [N] = weight [N, K] times x [K]; GROUP inputs share a scale (0: all), which is by output where BY_ROW."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    line = tl.minimum(n, N - 1).to(tl.int64)[:, None]
    at = tl.arange(0, BK)[None, :]
    acc = tl.zeros((BN, BK), tl.float32)
    for begin in range(0, pitch, BK):
        word = begin + at
        there = word < pitch
        values = tl.load(x + word, mask=there, other=0.0).to(tl.float32)
        codes = tl.load(weight + line * pitch + word, mask=there, other=0.0)
        group = word // GROUP if GROUP else word * 0
        if KIND == W8:
            codes = _float_of((codes.to(tl.int32) & 255) ^ 128) - 128.0
            if ZERO:
                codes -= tl.load(zeros + group * scale_columns + line, mask=there, other=0.0).to(tl.float32)
        part = codes.to(tl.float32) * values
        if GROUP:
            place = line // GROUP * scale_columns + group if KIND == F8 else group * scale_columns + line
            part *= tl.load(scales + place, mask=there, other=0.0).to(tl.float32)
        acc += part
    total = tl.sum(acc, axis=1)
    if KIND != DENSE and GROUP == 0:
        total *= tl.load(scales + (tl.minimum(n, N - 1) if BY_ROW else n * 0)).to(tl.float32)
    tl.store(out + n, total.to(out.dtype.element_ty), mask=n < N)
