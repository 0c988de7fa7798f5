"""The activation of a gated MLP in Triton, to floats and to 8 bits."""

from __future__ import annotations

from types import MappingProxyType

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagoda.backend.torch.kernels import fp8, launch
from pagoda.backend.torch.kernels.launch import await_others, block_of, warps_for
from pagoda.backend.torch.kernels.norm import in_8_bits, scale_for

_BLOCK = 1024
SILU, GELU, CLAMPED = (tl.constexpr(n) for n in (1, 2, 3))
KINDS = MappingProxyType({"": 0, "silu": 1, "gelu_tanh": 2, "clamped_swiglu": 3})


@triton.jit
def activated(gate: tl.tensor, up: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    """An activation of gate, times up."""
    if KIND == CLAMPED:
        gate, up = tl.where(gate > 7.0, 7.0, gate), tl.where(up > 7.0, 7.0, tl.where(up < -7.0, -7.0, up))
        return gate / (1.0 + tl.exp(-1.702 * gate)) * (up + 1.0)
    else:
        # gelu by tanh is x * sigmoid(2 u), u = sqrt(2 / pi) * (x + 0.044715 x^3)
        inner = gate * (1.5957691216 + 0.0713548163 * gate * gate) if KIND == GELU else gate
        return gate / (1.0 + tl.exp(-inner)) * up


@triton.jit
def _gated(
    gate_up: tl.tensor,
    out: tl.tensor,
    scales: tl.tensor,
    size: tl.tensor,
    runs: tl.tensor,
    KIND: tl.constexpr,
    RUN: tl.constexpr,
    INT8: tl.constexpr,
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    """RUN: `out` is of 8 bits, each of the `runs` runs of so many values has a scale of its own (0: of floats)."""
    await_others(CHAINED)
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    gate = tl.load(gate_up + row * 2 * size + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * size + size + at, mask=inside, other=0.0).to(tl.float32)
    product = activated(gate, up, KIND)
    if RUN:
        exact = product.to(gate_up.dtype.element_ty).to(tl.float32)
        parts = tl.reshape(tl.where(inside, exact, 0.0), (BLOCK // RUN, RUN))
        own = scale_for(parts, INT8, 1)
        coded = in_8_bits(parts, tl.expand_dims(own, 1), out.dtype.element_ty, INT8)
        tl.store(out + row * size + at, tl.reshape(coded, (BLOCK,)), mask=inside)
        run = tl.program_id(1) * (BLOCK // RUN) + tl.arange(0, BLOCK // RUN)
        tl.store(scales + row * runs + run, own, mask=run < runs)
    else:
        tl.store(out + row * size + at, product.to(out.dtype.element_ty), mask=inside)


def gated(gate_up: Tensor, activation: str) -> Tensor:
    """An activation of the first half of the last axis times the second half; see ops."""
    out = torch.empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2, dtype=gate_up.dtype, device=gate_up.device)
    _run(gate_up, activation, out, out, 0, _BLOCK)
    return out


def coded_gated(gate_up: Tensor, activation: str, kind: torch.dtype, run: int) -> tuple[Tensor, Tensor]:
    """The same of gate_up [T, 2 * size] as codes (int8 or FP8) and scales [T, runs], one for each run of values, a
    power of two (from size on: one for the row), as quantize_rows and quantize_f8 make them of it."""
    rows, size = len(gate_up), gate_up.shape[1] // 2
    out = torch.empty(rows, size, dtype=kind, device=gate_up.device)
    scales = torch.empty(rows, triton.cdiv(size, run), dtype=torch.float32, device=gate_up.device)
    run = run if run < size else block_of(size)
    _run(gate_up, activation, fp8.known(out), scales, run, max(run, _BLOCK))
    return out, scales


def _run(gate_up: Tensor, activation: str, out: Tensor, scales: Tensor, run: int, block: int) -> None:
    size = gate_up.shape[-1] // 2
    flat = gate_up.contiguous().view(-1, 2 * size)
    if len(flat):
        _gated[(len(flat), triton.cdiv(size, block))](
            flat, out, scales, size, scales.shape[-1], KIND=KINDS[activation], RUN=run, INT8=out.dtype == torch.int8,
            BLOCK=block, num_warps=max(4, warps_for(block)), **launch.chained(flat.device),
        )  # fmt: skip
