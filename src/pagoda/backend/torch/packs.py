"""Weight matrices as the device keeps them: how each kind is stored, and the numbers it stands for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0


@dataclass(frozen=True, slots=True)
class Dense:
    """Floats [..., out, in]. Every kind may have one leading axis: the experts of a layer."""

    data: Tensor

    @property
    def rows(self) -> int:
        return self.data.shape[-2]

    def expert(self, index: int) -> Self:
        return replace(self, data=self.data[index])

    def floats(self) -> Tensor:
        return self.data


@dataclass(frozen=True, slots=True)
class W4:
    """4-bit codes with a scale and a zero point for each group of inputs: scale * (code - zero). See `pack_w4`.

    `order` [in] (act order): column i of the codes belongs to input order[i]; groups are runs of columns.
    """

    codes: Tensor  # uint8 [..., out, in / 2]; byte j holds column 2j (low half) and 2j + 1
    scales: Tensor  # float [..., groups, out]
    zeros: Tensor  # float [..., groups, out]
    order: Tensor | None = None

    @property
    def rows(self) -> int:
        return self.codes.shape[-2]

    def expert(self, index: int) -> Self:
        order = None if self.order is None else self.order[index]
        return replace(self, codes=self.codes[index], scales=self.scales[index], zeros=self.zeros[index], order=order)

    def floats(self) -> Tensor:
        """[..., out, in] in float32, columns in the order of the codes."""
        codes = torch.stack((self.codes & 15, self.codes >> 4), dim=-1).flatten(-2)
        return _affine(codes, self.scales, self.zeros)


@dataclass(frozen=True, slots=True)
class W8:
    """8-bit codes with a scale, and where `zeros` is there a zero point, for each group of inputs."""

    codes: Tensor  # int8 [..., out, in]
    scales: Tensor  # float [..., groups, out]
    zeros: Tensor | None = None  # float [..., groups, out]
    order: Tensor | None = None  # as in W4

    @property
    def rows(self) -> int:
        return self.codes.shape[-2]

    def expert(self, index: int) -> Self:
        zeros = None if self.zeros is None else self.zeros[index]
        order = None if self.order is None else self.order[index]
        return replace(self, codes=self.codes[index], scales=self.scales[index], zeros=zeros, order=order)

    def floats(self) -> Tensor:
        """[..., out, in] in float32, columns in the order of the codes."""
        return _affine(self.codes, self.scales, self.zeros)


@dataclass(frozen=True, slots=True)
class I8:
    """int8 with one scale per output; inputs are made int8 too, each row with a scale of its own."""

    codes: Tensor  # int8 [..., out, in]
    scales: Tensor  # float32 [..., out]

    @property
    def rows(self) -> int:
        return self.codes.shape[-2]

    def expert(self, index: int) -> Self:
        return replace(self, codes=self.codes[index], scales=self.scales[index])

    def floats(self) -> Tensor:
        return self.codes.float() * self.scales.unsqueeze(-1)


@dataclass(frozen=True, slots=True)
class F8:
    """FP8 (e4m3) times a scale: for the whole matrix [1, 1], for each output [out, 1], or for each `block` of it.

    Inputs are made FP8 too: with blocks each run of block[1] inputs has a scale of its own, else each row has, or all
    share `input_scale` (a tensor of one value). `quantize_input` False leaves them as they are.
    """

    codes: Tensor  # float8_e4m3fn [..., out, in]
    scales: Tensor  # float32 [..., 1 | out | out blocks, 1 | in blocks]
    block: tuple[int, int] | None = None
    input_scale: Tensor | None = None
    quantize_input: bool = True

    @property
    def rows(self) -> int:
        return self.codes.shape[-2]

    def expert(self, index: int) -> Self:
        return replace(self, codes=self.codes[index], scales=self.scales[index])

    def floats(self) -> Tensor:
        scales, values = self.scales, self.codes.float()
        if self.block is not None:
            scales = scales.repeat_interleave(self.block[0], -2).repeat_interleave(self.block[1], -1)
            scales = scales[..., : values.shape[-2], : values.shape[-1]]
        return values * scales


Weight = Dense | W4 | W8 | I8 | F8


def _affine(codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """scale * (code - zero) by group; scales and zeros are [..., groups, out]."""
    size = codes.shape[-1] // scales.shape[-2]
    values = torch.unflatten(codes.float(), -1, (-1, size))  # [..., out, groups, group]
    if zeros is not None:
        values = values - zeros.float().transpose(-1, -2).unsqueeze(-1)
    return (values * scales.float().transpose(-1, -2).unsqueeze(-1)).flatten(-2)


def pack_w4(codes: Tensor, scales: Tensor, zeros: Tensor, order: Tensor | None = None) -> W4:
    """From codes uint8 [..., out, in], one per byte, in runs of groups; scales and zeros [..., groups, out]."""
    pairs = torch.unflatten(codes, -1, (-1, 2))
    return W4(pairs[..., 0] | pairs[..., 1] << 4, scales, zeros, order)
