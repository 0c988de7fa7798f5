"""MXFP4 checkpoints as gpt-oss has them: experts of 4-bit floats, each 32 of which share a power of two."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from pagoda.errors import ModelError
from pagoda.weights.ggml import BLOCKS
from pagoda.weights.grouped import Bytes, MadeTensor, Stacked
from pagoda.weights.source import Tensor

_BLOCKS, _SCALES = "_blocks", "_scales"
_LOW = np.uint64(0x0F0F0F0F0F0F0F0F)
_FOUR = np.uint64(4)


@dataclass(frozen=True, slots=True)
class Microscaled:
    """A matrix [out, in], or each `step`-th of its outputs from `first` on.

    `codes` uint8 [out, in / 32, 16]: byte i of a block holds its values 2i (low half) and 2i + 1. `scales`
    [out, in / 32] are exponents of two, plus 127.
    """

    name: str
    codes: Bytes
    scales: Bytes
    first: int = 0
    step: int = 1

    def every(self, step: int, first: int) -> Tensor:
        return replace(self, step=step, first=first).tensor()

    def tensor(self) -> Tensor:
        shape = (len(range(self.first, len(self.codes), self.step)), self.codes.shape[1] * BLOCKS["MXFP4"].elements)
        return MadeTensor(self.name, shape, "MXFP4", partial(_as_blocks, self), self)


def mxfp4_tensors(path: str, table: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a model, each `X_blocks` and its `X_scales` replaced by one X of matrices, by expert."""
    out = dict(tensors)
    for name in [n for n in tensors if n.endswith(_BLOCKS)]:
        stem = name.removesuffix(_BLOCKS)
        scales = out.pop(stem + _SCALES, None)
        if scales is None:
            raise ModelError(f"the checkpoint lacks the tensor {stem}{_SCALES}", remedy="Download the model again")
        out[stem] = _stack(stem, out.pop(name), scales)
    return out


def _stack(name: str, codes: Tensor, scales: Tensor) -> Tensor:
    shape = codes.shape
    if codes.type != "U8" or scales.type != "U8" or len(shape) != 4 or shape[3] != 16 or scales.shape != shape[:3]:
        raise ModelError(
            f"the tensors {codes.name} {codes.type} {list(shape)} and {scales.name} {scales.type} "
            f"{list(scales.shape)} are no MXFP4 experts",
            remedy="Download the model again, or take a GGUF file of it",
        )
    each = zip(codes.data.reshape(shape), scales.data.reshape(scales.shape), strict=True)
    return Stacked(tuple(Microscaled(name, *parts).tensor() for parts in each)).tensor(name)


def _as_blocks(m: Microscaled) -> Bytes:
    """As in a GGUF file: the scale in front, byte i with values i and i + 16."""
    codes, scales = m.codes[m.first :: m.step], m.scales[m.first :: m.step]
    words = np.ascontiguousarray(codes).view(np.uint64)
    first, second = words[..., 0], words[..., 1]
    even, odd = first & _LOW | (second & _LOW) << _FOUR, first >> _FOUR & _LOW | second & ~_LOW
    pairs = odd.view(np.uint8).astype("<u2") << np.uint16(8) | even.view(np.uint8)
    out = np.empty((*scales.shape, BLOCKS["MXFP4"].bytes), np.uint8)
    out[..., 0], out[..., 1:] = scales, pairs.view(np.uint8).reshape(*scales.shape, -1)
    return out.reshape(-1)
