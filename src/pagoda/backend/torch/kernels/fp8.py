"""FP8 (e4m3) in Triton: by the GPU's own conversions, or from and to its bits where it has none (before Ada)."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagoda.backend.torch.kernels import launch

FP8 = torch.float8_e4m3fn
SINCE = (8, 9)
_MOST = tl.constexpr(448.0)
_LEAST_NORMAL = tl.constexpr(2.0**-6)


def known(x: Tensor) -> Tensor:
    """FP8 as the kernels take it: bytes where the GPU has no such type. Other tensors as they are."""
    own = x.dtype == FP8 and launch.gpu_of(x.device).capability < SINCE
    return x.view(torch.uint8) if own else x


def by_rows(codes: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor) -> Tensor:
    """PyTorch's own product of codes [T, K] and the transpose of a weight [N, K], with scales for each row of both."""
    own = weight_scales.expand(len(weight), 1).t().contiguous()
    return torch._scaled_mm(codes, weight.t(), scales, own, out_dtype=torch.bfloat16, use_fast_accum=True)


@cache
def has_row_scales(device: torch.device) -> bool:
    """Whether a GPU has that product: PyTorch is not made with it for each of them."""
    if device.type != "cuda":
        return False
    codes, scales = torch.zeros(32, 32, device=device).to(FP8), torch.ones(32, 1, device=device)
    try:
        by_rows(codes, scales, codes, scales)
    except RuntimeError:
        return False
    return True


@triton.jit
def floats(codes: tl.tensor, kind: tl.constexpr) -> tl.tensor:
    """Codes of any type as floats; unsigned bytes are e4m3."""
    if codes.dtype == tl.uint8:
        bits = codes.to(tl.uint16)
        # its bits are those of a float16 of the 256th part
        half = (((bits & 128) << 8) | ((bits & 127) << 7)).to(tl.float16, bitcast=True)
        return (half * 256.0).to(kind)
    else:
        return codes.to(kind)


@triton.jit
def codes(values: tl.tensor, kind: tl.constexpr) -> tl.tensor:
    """Floats as e4m3, the largest of those beyond; `kind` is that type, or unsigned bytes."""
    values = tl.clamp(values.to(tl.float32), -_MOST, _MOST)
    if kind == tl.uint8:
        bits = values.to(tl.int32, bitcast=True)
        large = bits & 0x7FFFFFFF
        # to the nearest, of two the even one; exponents count from 120 higher
        large = ((large + 0x7FFFF + ((large >> 20) & 1)) >> 20) - 960
        small = (tl.abs(values) * 512.0 + 12582912.0).to(tl.int32, bitcast=True) & 15
        code = tl.where(tl.abs(values) < _LEAST_NORMAL, small, large)
        return (code | ((bits >> 24) & 128)).to(tl.uint8)
    else:
        return values.to(kind)
