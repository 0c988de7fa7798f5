"""RMS norm in Triton, with the residual sum, and the quantization of rows, each in one pass over its row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagoda.backend.torch.kernels import fp8, launch
from pagoda.backend.torch.kernels.launch import await_others, block_of, warps_for

_LEAST = tl.constexpr(1e-10)


@triton.jit
def _norm(
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    total: tl.tensor,
    rows: tl.tensor,
    n: tl.tensor,
    stride: tl.tensor,
    eps: tl.tensor,
    SUM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    at = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (at < n)
    factor = tl.load(weight + at, mask=at < n, other=0.0).to(tl.float32)
    await_others(CHAINED)
    values = tl.load(x + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    if SUM:
        more = tl.load(residual + row * n + at, mask=inside, other=0.0).to(tl.float32)
        rounded = (values + more).to(total.dtype.element_ty)
        tl.store(total + row * n + at, rounded, mask=inside)
        values = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, axis=1)[:, None] / n + eps)
    tl.store(out + row * n + at, (values * scale * factor).to(out.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See ops.rms_norm. Rows may lie apart: x is contiguous along its last axis only."""
    return _run(x, None, weight, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See ops.add_rms_norm."""
    return _run(x, residual, weight, eps)


def _run(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    n = x.shape[-1]
    flat = x.reshape(-1, n)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = out if residual is None else torch.empty_like(out)
    block = block_of(n)
    rows_at_once = max(1, min(16, 1024 // block))
    grid = (triton.cdiv(len(flat), rows_at_once),)
    if len(flat):
        _norm[grid](
            flat, residual if residual is not None else flat, weight, out, total, len(flat), n, flat.stride(0), eps,
            SUM=residual is not None, ROWS=rows_at_once, BLOCK=block, num_warps=warps_for(block * rows_at_once),
            **launch.chained(x.device),
        )  # fmt: skip
    return out, total


@triton.jit
def _quantize(
    x: tl.tensor,
    given: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    n: tl.tensor,
    runs: tl.tensor,
    SIZE: tl.constexpr,
    GIVEN: tl.constexpr,
    INT8: tl.constexpr,
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    await_others(CHAINED)
    row, run = tl.program_id(0).to(tl.int64), tl.program_id(1)
    within = tl.arange(0, BLOCK)
    at = run * SIZE + within
    inside = (within < SIZE) & (at < n)
    values = tl.load(x + row * n + at, mask=inside, other=0.0).to(tl.float32)
    most = 127.0 if INT8 else 448.0
    if GIVEN:
        scale = tl.load(given).to(tl.float32)
    else:
        scale = tl.div_rn(tl.maximum(tl.max(tl.abs(values), axis=0), _LEAST), most)
    tl.store(scales + row * runs + run, scale)
    values = tl.clamp(tl.div_rn(values, scale), -most, most)
    if INT8:
        # adding 1.5 * 2^23 rounds to the nearest even whole number, as torch.round does
        values = (values + 12582912.0) - 12582912.0
        tl.store(codes + row * n + at, values.to(tl.int8), mask=inside)
    else:
        tl.store(codes + row * n + at, fp8.codes(values, codes.dtype.element_ty), mask=inside)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """See ops.quantize_rows."""
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    return codes, _launch_quantize(x, codes, x.shape[-1], None)


def quantize_f8(x: Tensor, size: int, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See ops.quantize_f8."""
    codes = torch.empty(x.shape, dtype=fp8.FP8, device=x.device)
    return codes, _launch_quantize(x, codes, size, scale)


def _launch_quantize(x: Tensor, codes: Tensor, size: int, scale: Tensor | None) -> Tensor:
    x = x.contiguous()
    runs, block = triton.cdiv(x.shape[1], size), block_of(size)
    scales = torch.empty(len(x), runs, dtype=torch.float32, device=x.device)
    if len(x):
        _quantize[(len(x), runs)](
            x, scale if scale is not None else scales, fp8.known(codes), scales, x.shape[1], runs,
            SIZE=size, GIVEN=scale is not None, INT8=codes.dtype == torch.int8, BLOCK=block, num_warps=warps_for(block),
            **launch.chained(x.device),
        )  # fmt: skip
    return scales
