"""A part of a stored tensor as a tensor of its own: nothing is read for it until its data is, and then only that."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy as np
import numpy.typing as npt

from pagoda.errors import ModelError
from pagoda.weights.fp8 import Scaled
from pagoda.weights.ggml import BLOCKS, nbytes
from pagoda.weights.grouped import BLOCK, Bytes, Grouped, MadeTensor, Stacked
from pagoda.weights.source import Tensor

STACK, OUTPUTS, INPUTS = -3, -2, -1
"""The axes of a matrix; of stacked ones too."""


def part(tensor: Tensor, axis: int, first: int, last: int) -> Tensor:
    """Places first:last of an axis. ModelError where values that are stored together would come apart."""
    if (first, last) == (0, tensor.shape[axis]):
        return tensor
    match tensor.origin if isinstance(tensor, MadeTensor) else None:
        case Stacked(parts) if axis == STACK:
            return Stacked(parts[first:last]).tensor(tensor.name)
        case Stacked(parts):
            return Stacked(tuple(part(one, axis, first, last) for one in parts)).tensor(tensor.name)
        case Grouped() as m:
            return _grouped(m, axis, first, last).tensor()
        case Scaled() as m:
            return _scaled(m, axis, first, last).tensor()
    return _stored(tensor, axis, first, last)


def rows(tensor: Tensor, places: npt.NDArray[np.intp]) -> Tensor:
    """These rows of a matrix, in this order. What it was made from does not go with it."""
    shape = (len(places), *tensor.shape[1:])
    return MadeTensor(tensor.name, shape, tensor.type, partial(_rows, tensor, places))


def _rows(tensor: Tensor, places: npt.NDArray[np.intp]) -> Bytes:
    return np.ascontiguousarray(tensor.data.reshape(tensor.shape[0], -1)[places]).reshape(-1)


def _stored(tensor: Tensor, axis: int, first: int, last: int) -> Tensor:
    if axis == INPUTS:
        _whole(tensor.name, first, last, tensor.shape[axis], BLOCKS[tensor.type].elements)
    before, behind = tensor.shape[:axis], tensor.shape[axis:][1:]
    begin_bytes, end_bytes = (nbytes(tensor.type, (math.prod(behind) * place,)) for place in (first, last))
    shape, rows = (*before, last - first, *behind), math.prod(before)
    cut = partial(_cut, tensor, rows, begin_bytes, end_bytes)
    if rows == 1 and not isinstance(tensor, MadeTensor):
        return Tensor(tensor.name, shape, tensor.type, cut())  # a view of the file
    return MadeTensor(tensor.name, shape, tensor.type, cut)


def _cut(tensor: Tensor, rows: int, begin_bytes: int, end_bytes: int) -> Bytes:
    return np.ascontiguousarray(tensor.data.reshape(rows, -1)[:, begin_bytes:end_bytes]).reshape(-1)


def _grouped(m: Grouped, axis: int, first: int, last: int) -> Grouped:
    outputs, inputs = m.shape
    if axis == OUTPUTS:  # the second axis of what is packed
        per_word, per_zero = outputs // m.words.shape[1], outputs // m.zero_words.shape[1]
        words = part(m.words, INPUTS, *_whole(m.name, first, last, outputs, per_word, per_word))
        zeros = part(m.zero_words, INPUTS, *_whole(m.name, first, last, outputs, per_zero, per_zero))
        scales = part(m.scales, INPUTS, first, last)
        return replace(m, shape=(last - first, inputs), words=words, zero_words=zeros, scales=scales)
    words = part(m.words, OUTPUTS, *_whole(m.name, first, last, inputs, BLOCK, inputs // m.words.shape[0]))
    group_of, shape = m.group_of[first:last], (outputs, last - first)
    if not m.in_order:
        # any input may be of any group: the part keeps the scales of all
        return replace(m, shape=shape, words=words, group_of=group_of)
    low, high = int(group_of[0]), int(group_of[-1]) + 1
    scales, zeros = part(m.scales, OUTPUTS, low, high), part(m.zero_words, OUTPUTS, low, high)
    made = replace(m, shape=shape, words=words, group_of=group_of - low, scales=scales, zero_words=zeros)
    if m.even and not made.even:
        raise ModelError(f"{m.name} cannot be cut at input {first}: its groups are of {inputs // m.scales.shape[0]}")
    return made


def _scaled(m: Scaled, axis: int, first: int, last: int) -> Scaled:
    codes, scales = part(m.codes, axis, first, last), m.scales
    if m.block is not None:
        size = m.block[axis]
        if first % size and first // size != (last - 1) // size:
            raise ModelError(f"{m.codes.name} cannot be cut at {first}: its blocks are of {size}")
        scales = part(scales, axis, first // size, -(-last // size))
    elif axis == OUTPUTS and scales.shape[0] > 1:
        scales = part(scales, axis, first, last)
    return replace(m, codes=codes, scales=scales)


def _whole(name: str, first: int, last: int, length: int, unit: int, per: int = 1) -> tuple[int, int]:
    """first and last in terms of `per`, where both are borders of units."""
    if first % unit or (last % unit and last != length):
        raise ModelError(f"{name} cannot be cut at {first} and {last}: {unit} values of it are stored together")
    return first // per, -(-last // per)
