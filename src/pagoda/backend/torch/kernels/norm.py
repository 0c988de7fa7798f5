"""RMS norm in Triton, with the residual sum and to 8 bits, and rows to 8 bits alone, each in one pass over its row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagoda.backend.torch.kernels import fp8, launch
from pagoda.backend.torch.kernels.launch import await_others, block_of, warps_for

_LEAST = tl.constexpr(1e-10)


@triton.jit
def scale_for(values: tl.tensor, INT8: tl.constexpr, AXIS: tl.constexpr) -> tl.tensor:
    """With which the largest of the values is the largest that there is in 8 bits."""
    return tl.div_rn(tl.maximum(tl.max(tl.abs(values), axis=AXIS), _LEAST), 127.0 if INT8 else 448.0)


@triton.jit
def in_8_bits(values: tl.tensor, scale: tl.tensor, kind: tl.constexpr, INT8: tl.constexpr) -> tl.tensor:
    most = 127.0 if INT8 else 448.0
    values = tl.clamp(tl.div_rn(values, scale), -most, most)
    if INT8:
        # adding 1.5 * 2^23 rounds to the nearest even whole number, as torch.round does
        return ((values + 12582912.0) - 12582912.0).to(tl.int8)
    else:
        return fp8.codes(values, kind)


@triton.jit(do_not_specialize=["rows"])
def _norm(
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    scales: tl.tensor,
    total: tl.tensor,
    rows: tl.tensor,
    n: tl.tensor,
    stride: tl.tensor,
    eps: tl.tensor,
    runs: tl.tensor,
    SUM: tl.constexpr,
    RUN: tl.constexpr,
    INT8: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    """RUN: `out` is of 8 bits, each of the `runs` runs of so many values has a scale of its own (0: it is as x is)."""
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
    normed = (values * scale * factor).to(x.dtype.element_ty)
    if RUN:
        parts = tl.reshape(normed.to(tl.float32), (ROWS, BLOCK // RUN, RUN))
        own = scale_for(parts, INT8, 2)
        coded = in_8_bits(parts, tl.expand_dims(own, 2), out.dtype.element_ty, INT8)
        tl.store(out + row * n + at, tl.reshape(coded, (ROWS, BLOCK)), mask=inside)
        run = tl.arange(0, BLOCK // RUN)[None, :]
        tl.store(scales + row * runs + run, own, mask=(row < rows) & (run < runs))
    else:
        tl.store(out + row * n + at, normed, mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See ops.rms_norm. Rows may lie apart: x is contiguous along its last axis only."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _run(x, None, weight, eps, out, out, out)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See ops.add_rms_norm."""
    out, total = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    _run(x, residual, weight, eps, out, out, total)
    return out, total


def coded_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, kind: torch.dtype, run: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The norm of x [T, n] + residual as codes (int8 or FP8) and scales [T, runs], one for each run of inputs, a power
    of two (from n on: one for the row), as quantize_rows and quantize_f8 make them of it; and that sum.
    """
    out, total = torch.empty(x.shape, dtype=kind, device=x.device), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    scales = torch.empty(len(x), triton.cdiv(x.shape[1], run), dtype=torch.float32, device=x.device)
    _run(x, residual, weight, eps, fp8.known(out), scales, total, run if run < x.shape[1] else block_of(x.shape[1]))
    return out, scales, total


def _run(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    out: Tensor,
    scales: Tensor,
    total: Tensor,
    run: int = 0,
) -> None:
    n = x.shape[-1]
    flat = x.reshape(-1, n)
    block = block_of(n)
    rows_at_once = max(1, min(16, 1024 // block))
    grid = (triton.cdiv(len(flat), rows_at_once),)
    if len(flat):
        _norm[grid](
            flat, residual if residual is not None else flat, weight, out, scales, total, len(flat), n, flat.stride(0),
            eps, scales.shape[-1], SUM=residual is not None, RUN=run, INT8=out.dtype == torch.int8, ROWS=rows_at_once,
            BLOCK=block, num_warps=warps_for(block * rows_at_once), **launch.chained(x.device),
        )  # fmt: skip


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
    scale = tl.load(given).to(tl.float32) if GIVEN else scale_for(values, INT8, 0)
    tl.store(scales + row * runs + run, scale)
    tl.store(codes + row * n + at, in_8_bits(values, scale, codes.dtype.element_ty, INT8), mask=inside)


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
