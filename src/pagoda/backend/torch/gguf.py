"""GGUF blocks to weights of 4 and 8 bits on the device: the same values, by scale and zero point of each group."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

import torch
from torch import Tensor

from pagoda.backend.torch.packs import M4, W8, Weight, pack_w4, packed
from pagoda.weights.ggml import BLOCKS

_IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_MOST_ZERO = 60000  # of zero points in float16
MXFP4 = "MXFP4"
Parts = tuple[int, Tensor, Tensor, Tensor | None]
"""Bits, codes [..., groups, group], scales [..., groups], and what is taken from scale * code, by group."""


def weight(kind: str, rows: Tensor, scale_type: torch.dtype) -> Weight:
    """`rows`: the stored bytes of each row, uint8 [..., bytes]."""
    if kind == MXFP4:
        blocks = torch.unflatten(rows, -1, (-1, BLOCKS[kind].bytes))
        codes = _nibbles(blocks[..., 1:]).flatten(-2)
        return M4(packed(codes), blocks[..., 0].transpose(-1, -2).contiguous(), codes.shape[-1])
    size, decode = DECODERS[kind]
    bits, codes, scales, low = decode(torch.unflatten(rows, -1, (-1, size)))
    codes, scales = codes.flatten(-3, -2), scales.flatten(-2)  # blocks and groups of a row: groups
    low = None if low is None else low.flatten(-2)
    zeros = None
    if low is not None:
        # a group of one value (scale 0, or next to nothing) is said by that value as the scale, times 0 - 1
        flat = scales.abs() * _MOST_ZERO < low.abs()
        codes = torch.where(flat.unsqueeze(-1), 0, codes)
        zeros = torch.where(flat, 1.0, low / torch.where(scales == 0, 1.0, scales))
        scales = torch.where(flat, low, scales)
    scales = scales.transpose(-1, -2).to(scale_type).contiguous()
    zeros = None if zeros is None else zeros.transpose(-1, -2).to(scale_type).contiguous()
    codes = codes.flatten(-2)
    if bits == 4:
        return pack_w4(codes, scales, torch.full_like(scales, 8) if zeros is None else zeros)
    return W8(codes.to(torch.int8), scales, zeros)


def _half(block: Tensor, first: int) -> Tensor:
    """The f16 number at byte `first` of each block, [..., blocks]."""
    return block[..., first : first + 2].contiguous().view(torch.float16).squeeze(-1).float()


def _nibbles(packed: Tensor) -> Tensor:
    """[..., n] bytes to [..., 2n] numbers: low halves before high ones."""
    return torch.cat((packed & 15, packed >> 4), dim=-1)


def _one(codes: Tensor, scales: Tensor, low: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Blocks that are one group each."""
    return codes.unsqueeze(-2), scales.unsqueeze(-1), None if low is None else low.unsqueeze(-1)


def _q4_0(b: Tensor) -> Parts:
    return 4, *_one(_nibbles(b[..., 2:]), _half(b, 0))


def _q4_1(b: Tensor) -> Parts:
    return 4, *_one(_nibbles(b[..., 4:]), _half(b, 0), -_half(b, 2))


def _q8_0(b: Tensor) -> Parts:
    return 8, *_one(b[..., 2:].contiguous().view(torch.int8), _half(b, 0))


def _iq4_nl(b: Tensor) -> Parts:
    values = torch.tensor(_IQ4_VALUES, dtype=torch.int8, device=b.device)
    return 8, *_one(values[_nibbles(b[..., 2:]).int()], _half(b, 0))


def _scales_and_lows(b: Tensor) -> tuple[Tensor, Tensor]:
    """Eight 6-bit scales and minima out of bytes 4 to 16 of K blocks, times d and m: [..., blocks, 8] each."""
    x, y, z = b[..., 4:8], b[..., 8:12], b[..., 12:16]
    scale = torch.cat((x & 63, z & 15 | x >> 6 << 4), dim=-1)
    low = torch.cat((y & 63, z >> 4 | y >> 6 << 4), dim=-1)
    return _half(b, 0).unsqueeze(-1) * scale, _half(b, 2).unsqueeze(-1) * low


def _q4_k(b: Tensor) -> Parts:
    scales, low = _scales_and_lows(b)
    return 4, torch.unflatten(_nibbles(torch.unflatten(b[..., 16:], -1, (4, 32))).flatten(-2), -1, (8, 32)), scales, low


def _q5_k(b: Tensor) -> Parts:
    scales, low = _scales_and_lows(b)
    codes = torch.unflatten(_nibbles(torch.unflatten(b[..., 48:], -1, (4, 32))).flatten(-2), -1, (8, 32))
    places = torch.arange(8, dtype=torch.uint8, device=b.device).unsqueeze(-1)
    return 8, codes | (b[..., None, 16:48] >> places & 1) << 4, scales, low


def _q6_k(b: Tensor) -> Parts:
    low = _nibbles(torch.unflatten(b[..., :128], -1, (2, 64)))  # [..., 2, 128]
    places = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=b.device).unsqueeze(-1)
    high = (torch.unflatten(b[..., 128:192], -1, (2, 1, 32)) >> places & 3).flatten(-2)
    codes = (low | high << 4).to(torch.int8) - 32
    scales = b[..., 192:208].contiguous().view(torch.int8) * _half(b, 208).unsqueeze(-1)
    return 8, torch.unflatten(codes.flatten(-2), -1, (16, 16)), scales, None


DECODERS: MappingProxyType[str, tuple[int, Callable[[Tensor], Parts]]] = MappingProxyType(
    {
        "Q4_0": (18, _q4_0),
        "Q4_1": (20, _q4_1),
        "Q8_0": (34, _q8_0),
        "IQ4_NL": (18, _iq4_nl),
        "Q4_K": (144, _q4_k),
        "Q5_K": (176, _q5_k),
        "Q6_K": (210, _q6_k),
    }
)
