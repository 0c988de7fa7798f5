"""Weight matrices as the device keeps them: how each kind is stored, and the numbers it stands for."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from pagoda.weights.device_size import W4_CHUNK

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_SHARED = ("input_scale",)
"""Fields that are one for all experts."""


class _Rows:
    """What every kind has. One leading axis more is that of the experts of a layer."""

    __slots__ = ()
    codes: Tensor

    @property
    def rows(self) -> int:
        return self.codes.shape[-2]

    def expert(self, index: int) -> Self:
        """The weight of one of them."""
        tensors = {f.name: getattr(self, f.name) for f in fields(cast(Any, self)) if f.name not in _SHARED}
        own: Self = replace(cast(Any, self), **{k: t[index] for k, t in tensors.items() if isinstance(t, Tensor)})
        return own


@dataclass(frozen=True, slots=True)
class Dense(_Rows):
    """Floats [..., out, in]. Every kind may have one leading axis: the experts of a layer."""

    data: Tensor

    @property
    def rows(self) -> int:
        return self.data.shape[-2]

    def floats(self) -> Tensor:
        return self.data


@dataclass(frozen=True, slots=True)
class W4(_Rows):
    """4-bit codes with a scale and a zero point for each group of inputs: scale * (code - zero). See `pack_w4`.

    Inputs come in chunks of 256, the last one filled up with codes 0: word j of a chunk holds columns j, 32 + j,
    64 + j, ..., four bits each, so that a slice of 32 inputs is in the same four bits of 32 words.
    `order` [in] (act order): column i of the codes belongs to input order[i]; groups are runs of columns. `whole`: zero
    points are whole numbers.
    """

    codes: Tensor  # int32 [..., out, words]
    scales: Tensor  # float [..., groups, out]
    zeros: Tensor  # float [..., groups, out]
    inputs: int
    order: Tensor | None = None
    whole: bool = False

    def floats(self) -> Tensor:
        """[..., out, in] in float32, columns in the order of the codes."""
        return _affine(_four_bits(self.codes, self.inputs), self.scales, self.zeros)


@dataclass(frozen=True, slots=True)
class M4(_Rows):
    """4-bit floats (e2m1) of which 32 inputs share a power of two (MXFP4), in the order of W4's codes."""

    codes: Tensor  # int32 [..., out, words]
    scales: Tensor  # uint8 [..., groups, out]: exponents, plus 127
    inputs: int

    def floats(self) -> Tensor:
        """[..., out, in] in float32."""
        values = torch.tensor(_E2M1, device=self.codes.device)[_four_bits(self.codes, self.inputs).long()]
        return _affine(values, (self.scales.int() << 23).view(torch.float32), None)


@dataclass(frozen=True, slots=True)
class W8(_Rows):
    """8-bit codes with a scale, and where `zeros` is there a zero point, for each group of inputs."""

    codes: Tensor  # int8 [..., out, in]
    scales: Tensor  # float [..., groups, out]
    zeros: Tensor | None = None  # float [..., groups, out]
    order: Tensor | None = None  # as in W4

    def floats(self) -> Tensor:
        """[..., out, in] in float32, columns in the order of the codes."""
        return _affine(self.codes, self.scales, self.zeros)


@dataclass(frozen=True, slots=True)
class I8(_Rows):
    """int8 with one scale per output; inputs are made int8 too, each row with a scale of its own."""

    codes: Tensor  # int8 [..., out, in]
    scales: Tensor  # float32 [..., out]

    def floats(self) -> Tensor:
        return self.codes.float() * self.scales.unsqueeze(-1)


@dataclass(frozen=True, slots=True)
class F8(_Rows):
    """FP8 (e4m3) times a scale: for the whole matrix [1, 1], for each output [out, 1], or for each `block` of it.

    Inputs are made FP8 too: with blocks each run of block[1] inputs has a scale of its own, else each row has, or all
    share `input_scale` (a tensor of one value). `quantize_input` False leaves them as they are.
    """

    codes: Tensor  # float8_e4m3fn [..., out, in]
    scales: Tensor  # float32 [..., 1 | out | out blocks, 1 | in blocks]
    block: tuple[int, int] | None = None
    input_scale: Tensor | None = None
    quantize_input: bool = True

    def floats(self) -> Tensor:
        scales, values = self.scales, self.codes.float()
        if self.block is not None:
            scales = scales.repeat_interleave(self.block[0], -2).repeat_interleave(self.block[1], -1)
            scales = scales[..., : values.shape[-2], : values.shape[-1]]
        return values * scales


Weight = Dense | W4 | M4 | W8 | I8 | F8


def _four_bits(codes: Tensor, inputs: int) -> Tensor:
    """[..., out, in] of the words of W4."""
    words = torch.unflatten(codes, -1, (-1, W4_CHUNK // 8))
    return torch.stack([words >> 4 * n & 15 for n in range(8)], dim=-2).flatten(-3)[..., :inputs]


def _affine(codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """scale * (code - zero) by group; scales and zeros are [..., groups, out]."""
    size = codes.shape[-1] // scales.shape[-2]
    values = torch.unflatten(codes.float(), -1, (-1, size))  # [..., out, groups, group]
    if zeros is not None:
        values = values - zeros.float().transpose(-1, -2).unsqueeze(-1)
    return (values * scales.float().transpose(-1, -2).unsqueeze(-1)).flatten(-2)


def pack_w4(codes: Tensor, scales: Tensor, zeros: Tensor, order: Tensor | None = None, *, whole: bool = False) -> W4:
    """From codes uint8 [..., out, in], one per byte, in runs of groups; scales and zeros [..., groups, out]."""
    return W4(packed(codes), scales.contiguous(), zeros.contiguous(), codes.shape[-1], order, whole)


def packed(codes: Tensor) -> Tensor:
    """Codes uint8 [..., out, in] as the words of W4."""
    chunks = torch.unflatten(F.pad(codes, (0, -codes.shape[-1] % W4_CHUNK)), -1, (-1, 8, W4_CHUNK // 8))
    words = chunks[..., 0, :].int()
    for n in range(1, 8):
        words |= chunks[..., n, :].int() << 4 * n
    return words.flatten(-2)
