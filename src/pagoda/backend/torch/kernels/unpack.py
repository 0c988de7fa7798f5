"""Quantized matrices back to floats in Triton: what a product of many rows begins with, cuBLAS does the rest."""

from __future__ import annotations

import triton
import triton.language as tl

from pagoda.backend.torch.kernels import fp8
from pagoda.backend.torch.kernels.launch import await_others
from pagoda.backend.torch.kernels.product import F8, W4
from pagoda.backend.torch.kernels.w4 import doubled, scale_of
from pagoda.weights.device_size import W4_CHUNK

_CHUNK = tl.constexpr(W4_CHUNK)


@triton.jit
def _unpack(
    weight: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    out: tl.tensor,
    K: tl.tensor,
    pitch: tl.tensor,
    scale_columns: tl.tensor,
    KIND: tl.constexpr,
    ZERO: tl.constexpr,
    BY_ROW: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    await_others(CHAINED)
    n = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = k < K
    group = k // GROUP if GROUP else k * 0
    if KIND == W4:
        word = k // _CHUNK * (_CHUNK // 8) + k % 32
        code = tl.load(weight + n * pitch + word, mask=inside, other=0) >> (k % _CHUNK // 32 * 4) & 15
        if not ZERO:
            code = tl.where(code & 8 != 0, -1, 1) * doubled(code)
        codes = code.to(tl.float32) * (1.0 if ZERO else 0.5)
    else:
        codes = fp8.floats(tl.load(weight + n * K + k, mask=inside, other=0.0), tl.float32)
    if KIND == F8:
        row = (n // GROUP if GROUP else n) if BY_ROW else n * 0
        scale = tl.load(scales + row * scale_columns + group, mask=inside, other=0.0)
    else:
        scale = scale_of(scales + tl.where(inside, group, 0) * scale_columns + n)
    if ZERO:
        codes -= tl.load(zeros + group * scale_columns + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + n * K + k, (codes * scale.to(tl.float32)).to(out.dtype.element_ty), mask=inside)
