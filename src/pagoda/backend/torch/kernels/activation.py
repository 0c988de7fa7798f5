"""The activation of a gated MLP in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagoda.backend.torch.kernels import launch
from pagoda.backend.torch.kernels.launch import await_others

_BLOCK = 1024


@triton.jit
def _gated(
    gate_up: tl.tensor,
    out: tl.tensor,
    size: tl.tensor,
    GELU: tl.constexpr,
    CLAMPED: tl.constexpr,
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    await_others(CHAINED)
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    gate = tl.load(gate_up + row * 2 * size + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * size + size + at, mask=inside, other=0.0).to(tl.float32)
    if CLAMPED:
        gate, up = tl.where(gate > 7.0, 7.0, gate), tl.where(up > 7.0, 7.0, tl.where(up < -7.0, -7.0, up))
        product = gate / (1.0 + tl.exp(-1.702 * gate)) * (up + 1.0)
    else:
        # gelu by tanh is x * sigmoid(2 u), u = sqrt(2 / pi) * (x + 0.044715 x^3)
        inner = gate * (1.5957691216 + 0.0713548163 * gate * gate) if GELU else gate
        product = gate / (1.0 + tl.exp(-inner)) * up
    tl.store(out + row * size + at, product.to(out.dtype.element_ty), mask=inside)


def silu_mul(gate_up: Tensor) -> Tensor:
    """See ops.silu_mul."""
    return _run(gate_up)


def gelu_mul(gate_up: Tensor) -> Tensor:
    """See ops.gelu_mul."""
    return _run(gate_up, gelu=True)


def clamped_swiglu(gate_up: Tensor) -> Tensor:
    """See ops.clamped_swiglu."""
    return _run(gate_up, clamped=True)


def _run(gate_up: Tensor, *, gelu: bool = False, clamped: bool = False) -> Tensor:
    size = gate_up.shape[-1] // 2
    flat = gate_up.contiguous().view(-1, 2 * size)
    out = torch.empty((*gate_up.shape[:-1], size), dtype=gate_up.dtype, device=gate_up.device)
    if len(flat):
        grid = (len(flat), triton.cdiv(size, _BLOCK))
        chained = launch.chained(flat.device)
        _gated[grid](flat, out, size, GELU=gelu, CLAMPED=clamped, BLOCK=_BLOCK, num_warps=4, **chained)
    return out
